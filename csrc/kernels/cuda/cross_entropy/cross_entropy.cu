// Chooses the kernels of cross-entropy by the element type: see launch.cuh.
#include "cross_entropy.h"

#include "../common/dtype.cuh"

namespace lightkit::cuda::cross_entropy {

template <typename scalar_t>
cudaError_t run_as(const Rows& args, cudaStream_t stream);

cudaError_t run(const Rows& args, cudaStream_t stream) {
  switch (args.type) {
    case ElementType::Float:
      return run_as<float>(args, stream);
    case ElementType::Double:
      return run_as<double>(args, stream);
    case ElementType::BFloat16:
      return run_as<__nv_bfloat16>(args, stream);
    case ElementType::Half:
      return run_as<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lightkit::cuda::cross_entropy
