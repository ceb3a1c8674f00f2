// lightkit::cross_entropy on a GPU: memory, stream and launch.

#include "../common/checks.h"
#include "../common/element_type.h"
#include "../common/tensors.h"
#include "cross_entropy.h"

#include "../../kernels/cuda/cross_entropy/cross_entropy.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace lightkit {
namespace {

using at::Tensor;

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// Returns loss and lse. Writes the gradient to `gradient`, unless that is undefined.
std::tuple<Tensor, Tensor> run(
    const CrossEntropyProblem& problem,
    const Tensor& logits,
    const CrossEntropyOptions& options,
    const Tensor& gradient,
    bool with_lse) {
  const auto acc_options = logits.options().dtype(accumulation_type(logits.scalar_type()));
  // Without classes the kernel writes nothing.
  const auto make = [&](at::IntArrayRef sizes) {
    return problem.classes == 0 ? zeros(sizes, acc_options) : empty(sizes, acc_options);
  };
  const Tensor losses = make({problem.rows});
  const Tensor lse = with_lse ? make(loss_sizes(logits)) : empty({0}, acc_options);
  const bool unreduced = options.reduction == Reduction::None;
  const auto loss_type = options.dtype.value_or(logits.scalar_type());
  // The kernel writes the loss in its dtype if it has that type: a conversion would be one more launch.
  const auto total_type = element_type(loss_type) ? loss_type : at::kDouble;
  const Tensor total = unreduced ? Tensor() : empty({}, logits.options().dtype(total_type));
  const auto scratch_bytes = static_cast<int64_t>(sizeof(cuda::cross_entropy::Scratch));
  const Tensor scratch = empty({scratch_bytes}, logits.options().dtype(at::kByte));

  cuda::cross_entropy::Rows rows{};
  rows.type = element_type(logits.scalar_type()).value();
  rows.logits = problem.logits.const_data_ptr();
  rows.rows = problem.rows;
  rows.classes = problem.classes;
  rows.target = problem.target.defined() ? problem.target.const_data_ptr<int64_t>() : nullptr;
  rows.probabilities = data_or_null(problem.probabilities);
  rows.ignore_index = options.ignore_index;
  rows.weight = data_or_null(problem.weight);
  rows.smoothing = options.label_smoothing;
  rows.z_loss = options.z_loss;
  rows.softcap = options.softcap;
  rows.mean = options.reduction == Reduction::Mean;
  rows.scratch = static_cast<cuda::cross_entropy::Scratch*>(scratch.mutable_data_ptr());
  rows.losses = losses.mutable_data_ptr();
  rows.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  rows.gradient = gradient.defined() ? gradient.mutable_data_ptr() : nullptr;
  rows.total = unreduced ? nullptr : total.mutable_data_ptr();
  rows.total_type = element_type(total_type).value();
  C10_CUDA_CHECK(cuda::cross_entropy::run(rows, c10::cuda::getCurrentCUDAStream()));

  return {unreduced ? losses.view(loss_sizes(logits)).to(loss_type) : total.to(loss_type), lse};
}

Tensor empty_rows(const Tensor& like) {
  return empty_like(like);
}

constexpr CrossEntropyDevice kDevice{run, empty_rows, /*max_strided_classes=*/0};

}  // namespace

Results cross_entropy_forward_cuda(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return run_forward(kDevice, logits, target, weight, make_options(LIGHTKIT_OPTION_ARGUMENTS), with_gradient, with_lse);
}

std::tuple<Tensor, Tensor> cross_entropy_inplace_cuda(
    Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return run_forward_inplace(kDevice, logits, target, weight, make_options(LIGHTKIT_OPTION_ARGUMENTS), with_lse);
}

Tensor& apply_upstream_cuda(Tensor& gradient, const Tensor& upstream) {
  const int64_t rows = gradient.dim() == 2 ? gradient.size(0) : 1;
  const bool is_scalar = upstream.numel() == 1 && upstream.dim() <= gradient.dim();
  const bool is_column =
      gradient.dim() == 2 && upstream.dim() == 2 && upstream.size(0) == rows && upstream.size(1) == 1;
  // torch checks all other arguments.
  if (gradient.dim() > 2 || !gradient.is_contiguous() || !element_type(gradient.scalar_type()) ||
      !at::isFloatingType(upstream.scalar_type()) || upstream.device() != gradient.device() ||
      !(is_scalar || is_column)) {
    return gradient.mul_(upstream);
  }
  check_memory("_apply_upstream_", "the gradient", gradient);
  check_memory("_apply_upstream_", "upstream", upstream);
  const c10::cuda::CUDAGuard guard(gradient.device());
  const auto acc_type = accumulation_type(gradient.scalar_type());
  const Tensor factor = upstream.to(acc_type).contiguous();
  C10_CUDA_CHECK(
      cuda::cross_entropy::scale_rows(
          gradient.mutable_data_ptr(),
          element_type(gradient.scalar_type()).value(),
          rows,
          gradient.numel() / std::max<int64_t>(rows, 1),
          factor.const_data_ptr(),
          /*per_row=*/factor.numel() != 1,
          c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace lightkit
