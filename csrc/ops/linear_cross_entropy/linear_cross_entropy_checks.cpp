// Checks of the arguments of the fused linear cross-entropy, also for symbolic sizes.

#include "../common/checks.h"
#include "linear_cross_entropy.h"

namespace lightkit {

using at::Tensor;

void check_linear_arguments(const LinearInputs& inputs, const CrossEntropyOptions& options, int64_t memory_limit) {
  const Tensor &hidden = inputs.hidden, &head = inputs.linear_weight, &target = inputs.target;
  TORCH_CHECK_VALUE(
      hidden.dim() == 2 && head.dim() == 2 && hidden.sym_size(1) == head.sym_size(1),
      "linear_cross_entropy: input and linear_weight must be (N, D) and (C, D), got ",
      hidden.sym_sizes(),
      " and ",
      head.sym_sizes());
  TORCH_CHECK(
      at::isFloatingType(hidden.scalar_type()) && hidden.element_size() > 1,
      "linear_cross_entropy: the input must be float32, float64, bfloat16 or float16, got ",
      hidden.scalar_type());
  TORCH_CHECK(
      hidden.scalar_type() == head.scalar_type(),
      "linear_cross_entropy: linear_weight must be of the dtype of the input, ",
      hidden.scalar_type(),
      ", got ",
      head.scalar_type());
  TORCH_CHECK(
      at::isIntegralType(target.scalar_type(), /*includeBool=*/false),
      "linear_cross_entropy: class indices must be int64, int32 or uint8, got ",
      target.scalar_type());
  TORCH_CHECK_VALUE(
      target.dim() == 1 && target.sym_size(0) == hidden.sym_size(0),
      "linear_cross_entropy: for an input of shape ",
      hidden.sym_sizes(),
      " the target must have shape [",
      hidden.sym_size(0),
      "], got ",
      target.sym_sizes());
  const auto check_classes = [&](const std::optional<Tensor>& values, const char* name) {
    if (is_there(values)) {
      TORCH_CHECK(
          values->dim() == 1 && values->sym_size(0) == head.sym_size(0) && at::isFloatingType(values->scalar_type()),
          "linear_cross_entropy: ",
          name,
          " must hold a floating point value for each of the ",
          head.sym_size(0),
          " classes, got ",
          values->scalar_type(),
          " of shape ",
          values->sym_sizes());
    }
  };
  check_classes(inputs.linear_bias, "linear_bias");
  check_classes(inputs.weight, "weight");
  const auto check_device = [&](const Tensor& tensor, const char* name) {
    TORCH_CHECK(
        !tensor.defined() || tensor.device() == hidden.device(),
        "linear_cross_entropy: ",
        name,
        " is on ",
        tensor.device(),
        " but the input is on ",
        hidden.device());
  };
  check_device(head, "linear_weight");
  check_device(target, "the target");
  check_device(inputs.linear_bias.value_or(Tensor()), "linear_bias");
  check_device(inputs.weight.value_or(Tensor()), "weight");
  const auto reduction = static_cast<int64_t>(options.reduction);
  TORCH_CHECK_VALUE(
      reduction >= 0 && reduction <= 2,
      "linear_cross_entropy: reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
      reduction);
  TORCH_CHECK(
      options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0,
      "linear_cross_entropy: label_smoothing must be between 0.0 and 1.0, got ",
      options.label_smoothing);
  TORCH_CHECK_VALUE(
      options.softcap >= 0.0, "linear_cross_entropy: softcap must not be negative, got ", options.softcap);
  check_loss_dtype("linear_cross_entropy", options);
  TORCH_CHECK_VALUE(memory_limit > 0, "linear_cross_entropy: memory_limit must be positive, got ", memory_limit);
}

void check_kernel_arguments(
    const LinearInputs& inputs,
    const CrossEntropyOptions& options,
    int64_t memory_limit,
    const WantedGradients& wanted) {
  check_linear_arguments(inputs, options, memory_limit);
  TORCH_CHECK_VALUE(
      inputs.linear_weight.sym_numel() > 0,
      "linear_cross_entropy: the kernel wants a linear_weight that is not empty, got ",
      inputs.linear_weight.sym_sizes());
  TORCH_CHECK_VALUE(
      !wanted.linear_bias || is_there(inputs.linear_bias),
      "linear_cross_entropy: bias_wanted must be False where linear_bias is None, got True");
}

void check_memory(const LinearInputs& inputs) {
  constexpr auto op = "linear_cross_entropy";
  check_memory(op, "the input", inputs.hidden);
  check_memory(op, "linear_weight", inputs.linear_weight);
  check_memory(op, "the target", inputs.target);
  check_memory(op, "linear_bias", inputs.linear_bias);
  check_memory(op, "weight", inputs.weight);
}

void check_backward_arguments(
    const Tensor& grad_loss,
    const Tensor& row_statistics,
    const LinearInputs& inputs,
    const CrossEntropyOptions& options) {
  const Tensor& hidden = inputs.hidden;
  TORCH_CHECK_VALUE(
      row_statistics.dim() == 2 && row_statistics.sym_size(0) == 3 &&
          row_statistics.sym_size(1) == hidden.sym_size(0) &&
          row_statistics.scalar_type() == accumulation_type(hidden.scalar_type()) &&
          row_statistics.device() == hidden.device(),
      "linear_cross_entropy: row_statistics must be what the forward pass returned, got ",
      row_statistics.scalar_type(),
      " of shape ",
      row_statistics.sym_sizes());
  const bool each = options.reduction == Reduction::None;
  TORCH_CHECK_VALUE(
      grad_loss.dim() == (each ? 1 : 0) && (!each || grad_loss.sym_size(0) == hidden.sym_size(0)) &&
          grad_loss.device() == hidden.device() && at::isFloatingType(grad_loss.scalar_type()),
      "linear_cross_entropy: grad_loss must be floating point and have the shape of the loss, got ",
      grad_loss.scalar_type(),
      " of shape ",
      grad_loss.sym_sizes());
}

}  // namespace lightkit
