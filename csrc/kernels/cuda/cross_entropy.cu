// Cross-entropy on a GPU, by the type of the logits: see cross_entropy_launch.cuh.
#include "cross_entropy.h"

#include "dtype.cuh"

namespace lightkit::cuda {

template <typename scalar_t>
cudaError_t cross_entropy_of(const CrossEntropyRows& args, cudaStream_t stream);

cudaError_t cross_entropy(const CrossEntropyRows& args, cudaStream_t stream) {
  switch (args.type) {
    case LogitsType::Float:
      return cross_entropy_of<float>(args, stream);
    case LogitsType::Double:
      return cross_entropy_of<double>(args, stream);
    case LogitsType::BFloat16:
      return cross_entropy_of<__nv_bfloat16>(args, stream);
    case LogitsType::Half:
      return cross_entropy_of<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lightkit::cuda
