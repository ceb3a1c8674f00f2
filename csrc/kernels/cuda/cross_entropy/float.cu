// The kernels of cross-entropy for float logits.
#include "launch.cuh"

namespace lightkit::cuda::cross_entropy {

template cudaError_t run_as<float>(const Rows& args, cudaStream_t stream);

}  // namespace lightkit::cuda::cross_entropy
