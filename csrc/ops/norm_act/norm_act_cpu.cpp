// lightkit::norm_act on a CPU: layout, memory, and the kernels.

#include "../../kernels/cpu/norm_act/norm_act.h"
#include "norm_act.h"

namespace lightkit {
namespace {

using at::Tensor;

// Returns a tensor with the channels last in memory.
Tensor laid_out(const Tensor& tensor) {
  return tensor.dim() == 4 ? tensor.contiguous(kNormLayout) : tensor.contiguous();
}

Tensor contiguous_or_undefined(const std::optional<Tensor>& tensor) {
  return is_there(tensor) ? tensor->contiguous() : Tensor();
}

cpu::norm_act::Shape shape_of(const NormSizes& sizes, LIGHTKIT_ACTIVATION_PARAMETERS) {
  return {
      .images = sizes.images.expect_int(),
      .height = sizes.height.expect_int(),
      .width = sizes.width.expect_int(),
      .channels = sizes.channels.expect_int(),
      .activation = {static_cast<cpu::norm_act::Kind>(activation), alpha, beta},
      .pool = sizes.pool};
}

template <typename T>
T* mutable_or_null(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void run_forward(
    LIGHTKIT_NORM_PARAMETERS,
    const NormSizes& sizes,
    const Tensor& mean,
    const Tensor& var,
    const NormResults& results) {
  const Tensor x = laid_out(input);
  const Tensor added = is_there(residual) ? laid_out(*residual) : Tensor();
  const Tensor scale = contiguous_or_undefined(weight);
  const Tensor shift = contiguous_or_undefined(bias);
  const Tensor given = contiguous_or_undefined(statistics);
  const auto& [output, kept, live] = results;
  cpu::norm_act::forward<T>({
      .shape = shape_of(sizes, activation, alpha, beta),
      .input = x.const_data_ptr<T>(),
      .weight = data_or_null<T>(scale),
      .bias = data_or_null<T>(shift),
      .residual = data_or_null<T>(added),
      .statistics = data_or_null<T>(given),
      .running_mean = mutable_or_null<T>(mean),
      .running_var = mutable_or_null<T>(var),
      .training = training,
      .momentum = momentum,
      .eps = eps,
      .output = output.mutable_data_ptr<T>(),
      .kept = kept.mutable_data_ptr<T>(),
      .live = mutable_or_null<uint8_t>(live),
  });
}

template <typename T>
void run_backward(
    const NormSizes& sizes,
    const Tensor& grad_output,
    const Tensor& input,
    const std::optional<Tensor>& weight,
    const Tensor& kept,
    const Tensor& live,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual,
    bool training,
    LIGHTKIT_ACTIVATION_PARAMETERS,
    const NormGradients& gradients) {
  const Tensor g = laid_out(grad_output);
  const Tensor x = laid_out(input);
  const Tensor scale = contiguous_or_undefined(weight);
  const Tensor shift = contiguous_or_undefined(bias);
  const Tensor added = is_there(residual) ? laid_out(*residual) : Tensor();
  const Tensor kept_values = kept.contiguous();
  const Tensor kept_live = live.contiguous();
  const auto& [grad_input, grad_weight, grad_bias, grad_residual] = gradients;
  cpu::norm_act::backward<T>({
      .shape = shape_of(sizes, activation, alpha, beta),
      .grad_output = g.const_data_ptr<T>(),
      .input = x.const_data_ptr<T>(),
      .weight = data_or_null<T>(scale),
      .bias = data_or_null<T>(shift),
      .residual = data_or_null<T>(added),
      .kept = kept_values.const_data_ptr<T>(),
      .live = kept_live.numel() > 0 ? kept_live.const_data_ptr<uint8_t>() : nullptr,
      .training = training,
      .grad_input = mutable_or_null<T>(grad_input),
      .grad_weight = mutable_or_null<T>(grad_weight),
      .grad_bias = mutable_or_null<T>(grad_bias),
      .grad_residual = mutable_or_null<T>(grad_residual),
  });
}

}  // namespace

NormResults norm_forward_cpu(LIGHTKIT_NORM_PARAMETERS, bool keep) {
  constexpr auto op = "norm_act";
  const NormSizes sizes = check_norm(LIGHTKIT_NORM_ARGUMENTS);
  check_memory(op, "the input", input);
  check_memory(op, "weight", weight);
  check_memory(op, "bias", bias);
  check_memory(op, "running_mean", running_mean);
  check_memory(op, "running_var", running_var);
  check_memory(op, "the residual", residual);
  check_memory(op, "statistics", statistics);
  auto results = allocate_norm_results(input, sizes, keep);
  // The kernel updates contiguous tensors.
  const Tensor mean = contiguous_or_undefined(running_mean);
  const Tensor var = contiguous_or_undefined(running_var);
  if (input.scalar_type() == at::kDouble) {
    run_forward<double>(LIGHTKIT_NORM_ARGUMENTS, sizes, mean, var, results);
  } else {
    run_forward<float>(LIGHTKIT_NORM_ARGUMENTS, sizes, mean, var, results);
  }
  if (training && mean.defined()) {
    if (!mean.is_same(*running_mean)) {
      running_mean->copy_(mean);
    }
    if (!var.is_same(*running_var)) {
      running_var->copy_(var);
    }
  }
  return results;
}

NormGradients norm_backward_cpu(
    const Tensor& grad_output,
    const Tensor& input,
    const std::optional<Tensor>& weight,
    const Tensor& kept,
    const Tensor& live,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual,
    bool training,
    LIGHTKIT_ACTIVATION_PARAMETERS,
    int64_t pool,
    bool input_wanted,
    bool affine_wanted,
    bool residual_wanted) {
  constexpr auto op = "norm_act";
  const NormSizes sizes = check_norm_backward(grad_output, input, weight, kept, live, bias, residual, activation, pool);
  check_memory(op, "the gradient", grad_output);
  check_memory(op, "the input", input);
  check_memory(op, "weight", weight);
  check_memory(op, "`kept`", kept);
  check_memory(op, "`live`", live);
  check_memory(op, "bias", bias);
  check_memory(op, "the residual", residual);
  auto gradients = allocate_norm_gradients(input, sizes, input_wanted, affine_wanted, residual_wanted);
  if (input.scalar_type() == at::kDouble) {
    run_backward<double>(
        sizes, grad_output, input, weight, kept, live, bias, residual, training, activation, alpha, beta, gradients);
  } else {
    run_backward<float>(
        sizes, grad_output, input, weight, kept, live, bias, residual, training, activation, alpha, beta, gradients);
  }
  return gradients;
}

}  // namespace lightkit
