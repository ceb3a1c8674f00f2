// The GPU side of the SGD step: device and stream.

#include "sgd.h"

#include "../kernels/cuda/sgd.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace lightkit {

void sgd_cuda(const std::vector<SgdTensor>& tensors, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::sgd(tensors, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace lightkit
