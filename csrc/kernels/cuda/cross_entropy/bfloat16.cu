// The kernels of cross-entropy for __nv_bfloat16 logits.
#include "launch.cuh"

namespace lightkit::cuda::cross_entropy {

template cudaError_t run_as<__nv_bfloat16>(const Rows& args, cudaStream_t stream);

}  // namespace lightkit::cuda::cross_entropy
