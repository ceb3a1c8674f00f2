// lightkit::cross_entropy on a GPU: memory, stream and launch.

#include "cross_entropy.h"

#include "../kernels/cuda/cross_entropy.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace lightkit {
namespace {

using at::Tensor;

cuda::LogitsType logits_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return cuda::LogitsType::Float;
    case at::kDouble:
      return cuda::LogitsType::Double;
    case at::kBFloat16:
      return cuda::LogitsType::BFloat16;
    default:
      return cuda::LogitsType::Half;
  }
}

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

LossAndGradient forward_cuda(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index,
    double label_smoothing,
    std::optional<at::ScalarType> dtype,
    bool with_gradient) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto problem = make_problem(logits, target, weight, reduction, label_smoothing);
  const auto kind = static_cast<Reduction>(reduction);
  const auto acc_type = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor losses = at::empty({problem.rows}, logits.options().dtype(acc_type));
  const Tensor gradient = with_gradient ? at::empty_like(problem.logits) : at::empty({0}, logits.options());
  const Tensor sums = at::empty({3}, logits.options().dtype(at::kDouble));
  double* scratch = sums.mutable_data_ptr<double>();

  cuda::CrossEntropyRows rows{};
  rows.type = logits_type(logits);
  rows.logits = problem.logits.const_data_ptr();
  rows.rows = problem.rows;
  rows.classes = problem.classes;
  rows.target = problem.target.const_data_ptr<int64_t>();
  rows.ignore_index = ignore_index;
  rows.weight = data_or_null(problem.weight);
  rows.smooth = data_or_null(problem.smooth);
  rows.confidence = 1 - label_smoothing;
  rows.mean = kind == Reduction::Mean;
  rows.denominator = scratch;
  rows.smooth_sum = scratch + 1;
  rows.losses = losses.mutable_data_ptr();
  rows.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  rows.total = kind == Reduction::None ? nullptr : scratch + 2;
  C10_CUDA_CHECK(cuda::cross_entropy(rows, c10::cuda::getCurrentCUDAStream()));

  const auto loss_type = dtype.value_or(logits.scalar_type());
  const Tensor loss = kind == Reduction::None ? losses.view(target.sizes()).to(loss_type) : sums[2].to(loss_type);
  return {loss, with_gradient ? unflatten_rows(gradient, logits) : gradient};
}

Tensor& apply_upstream_cuda(Tensor& gradient, const Tensor& upstream) {
  if (gradient.dim() > 2 || !gradient.is_contiguous()) {
    return gradient.mul_(upstream);
  }
  const c10::cuda::CUDAGuard guard(gradient.device());
  const auto acc_type = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor factor = upstream.to(acc_type).contiguous();
  const int64_t rows = gradient.dim() == 2 ? gradient.size(0) : 1;
  C10_CUDA_CHECK(cuda::scale_rows(
      gradient.mutable_data_ptr(),
      logits_type(gradient),
      rows,
      gradient.numel() / std::max<int64_t>(rows, 1),
      factor.const_data_ptr(),
      /*per_row=*/factor.numel() != 1,
      c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(lightkit, CUDA, m) {
  m.impl("_cross_entropy_forward", forward_cuda);
  m.impl("_apply_upstream_", apply_upstream_cuda);
}

}  // namespace lightkit
