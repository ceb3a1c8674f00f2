// The optimizers' kernels on a GPU: device, stream and memory.

#include "../../kernels/cuda/optim/adam.h"
#include "../../kernels/cuda/optim/sgd.h"
#include "../../kernels/cuda/optim/step.h"
#include "../common/tensors.h"
#include "adam.h"
#include "sgd.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace lightkit {

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

void sgd_cuda(const std::vector<SgdTensor>& tensors, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::optim::sgd(tensors, c10::cuda::getCurrentCUDAStream()));
}

void adam_cuda(const std::vector<AdamTensor>& tensors, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::optim::adam(tensors, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor gradient_norm_cuda(
    const std::vector<Gradient>& gradients, c10::Device device, double factor, const float* scale) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto options = at::TensorOptions(at::kDouble).device(device);
  const int64_t count = cuda::optim::count_of_square_sums(gradients);
  const at::Tensor sums = empty({count}, options), norm = empty({}, options);
  C10_CUDA_CHECK(cuda::optim::square_sums(gradients, sums.mutable_data_ptr<double>(), stream));
  C10_CUDA_CHECK(
      cuda::optim::norm_of_square_sums(
          sums.const_data_ptr<double>(), count, factor, scale, norm.mutable_data_ptr<double>(), stream));
  return norm;
}

}  // namespace lightkit
