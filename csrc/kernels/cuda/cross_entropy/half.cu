// The kernels of cross-entropy for __half logits.
#include "launch.cuh"

namespace lightkit::cuda::cross_entropy {

template cudaError_t run_as<__half>(const Rows& args, cudaStream_t stream);

}  // namespace lightkit::cuda::cross_entropy
