// The kernels of cross-entropy for logits of type __nv_bfloat16.
#include "cross_entropy_launch.cuh"

namespace lightkit::cuda {

template cudaError_t cross_entropy_of<__nv_bfloat16>(const CrossEntropyRows& args, cudaStream_t stream);

}  // namespace lightkit::cuda
