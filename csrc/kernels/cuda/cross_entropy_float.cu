// The kernels of cross-entropy for logits of type float.
#include "cross_entropy_launch.cuh"

namespace lightkit::cuda {

template cudaError_t cross_entropy_of<float>(const CrossEntropyRows& args, cudaStream_t stream);

}  // namespace lightkit::cuda
