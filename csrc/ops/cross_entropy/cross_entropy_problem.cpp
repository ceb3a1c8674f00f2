// Checks, layout and shapes of cross-entropy around the kernel of a device.

#include "../common/checks.h"
#include "../common/tensors.h"
#include "cross_entropy_checks.h"

namespace lightkit {

using at::Tensor;

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

std::vector<int64_t> loss_sizes(const Tensor& logits) {
  return without_classes(logits, logits.sizes());
}

void check_loss_dtype(const char* op, const CrossEntropyOptions& options) {
  TORCH_CHECK_VALUE(
      !options.dtype.has_value() || at::isFloatingType(*options.dtype),
      op,
      ": the dtype of the loss must be floating point, got ",
      *options.dtype);
}

void check_arguments(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    const CrossEntropyOptions& options) {
  TORCH_CHECK_VALUE(logits.dim() >= 1, "cross_entropy: the logits must have at least one dimension, got a scalar");
  TORCH_CHECK(
      at::isFloatingType(logits.scalar_type()) && logits.element_size() > 1,
      "cross_entropy: the logits must be float32, float64, bfloat16 or float16, got ",
      logits.scalar_type());
  if (at::isFloatingType(target.scalar_type())) {
    TORCH_CHECK_VALUE(
        target.sym_sizes() == logits.sym_sizes(),
        "cross_entropy: class probabilities must have the shape of the logits, ",
        logits.sym_sizes(),
        ", got ",
        target.sym_sizes());
  } else {
    TORCH_CHECK(
        at::isIntegralType(target.scalar_type(), /*includeBool=*/false),
        "cross_entropy: class indices must be int64, int32 or uint8, got ",
        target.scalar_type());
    const auto expected = without_classes(logits, logits.sym_sizes());
    TORCH_CHECK_VALUE(
        target.sym_sizes() == c10::SymIntArrayRef(expected),
        "cross_entropy: for logits of shape ",
        logits.sym_sizes(),
        " the target must have shape ",
        c10::SymIntArrayRef(expected),
        ", got ",
        target.sym_sizes());
  }
  TORCH_CHECK(
      target.device() == logits.device(),
      "cross_entropy: the target is on ",
      target.device(),
      " but the logits are on ",
      logits.device());
  const auto reduction = static_cast<int64_t>(options.reduction);
  TORCH_CHECK_VALUE(
      reduction >= 0 && reduction <= 2,
      "cross_entropy: reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
      reduction);
  TORCH_CHECK(
      options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0,
      "cross_entropy: label_smoothing must be between 0.0 and 1.0, got ",
      options.label_smoothing);
  TORCH_CHECK_VALUE(options.softcap >= 0.0, "cross_entropy: softcap must not be negative, got ", options.softcap);
  check_loss_dtype("cross_entropy", options);
  if (is_there(weight)) {
    TORCH_CHECK(
        weight->dim() == 1 && weight->sym_size(0) == logits.sym_size(class_dim(logits)),
        "cross_entropy: weight must hold one value for each of the ",
        logits.sym_size(class_dim(logits)),
        " classes, got shape ",
        weight->sym_sizes());
    TORCH_CHECK(
        at::isFloatingType(weight->scalar_type()),
        "cross_entropy: weight must be floating point, got ",
        weight->scalar_type());
    TORCH_CHECK(
        weight->device() == logits.device(),
        "cross_entropy: weight is on ",
        weight->device(),
        " but the logits are on ",
        logits.device());
  }
}

namespace {

// Returns [rows, classes], a copy unless the classes are last in memory.
Tensor as_rows(const Tensor& tensor, int64_t rows, int64_t classes) {
  if (tensor.dim() == 2 && tensor.is_contiguous()) {
    return tensor;
  }
  // With 0 classes, reshape could not infer the number of rows.
  return tensor.movedim(class_dim(tensor), -1).reshape({rows, classes}).contiguous();
}

// Checks the arguments as torch.nn.functional.cross_entropy does, and lays them out. An input [N, C, d1, ...] is not
// copied if it is contiguous and has at most `max_strided_classes` classes, or if its classes are last in memory.
CrossEntropyProblem make_problem(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    const CrossEntropyOptions& options,
    int64_t max_strided_classes) {
  check_arguments(logits, target, weight, options);
  check_memory("cross_entropy", "the logits", logits);
  check_memory("cross_entropy", "the target", target);
  check_memory("cross_entropy", "weight", weight);
  CrossEntropyProblem problem;
  problem.classes = logits.size(class_dim(logits));
  problem.rows = checked_product("cross_entropy", loss_sizes(logits));
  problem.inner = problem.rows == 0 || logits.dim() == 1 ? 1 : problem.rows / logits.size(0);
  if (!(logits.is_contiguous() && problem.inner > 1 && problem.classes <= max_strided_classes)) {
    problem.inner = 1;
  }
  const auto laid_out = [&](const Tensor& tensor) {
    return problem.inner > 1 ? tensor.contiguous() : as_rows(tensor, problem.rows, problem.classes);
  };
  problem.logits = laid_out(logits);
  if (at::isFloatingType(target.scalar_type())) {
    problem.probabilities = laid_out(target.detach().to(logits.scalar_type()));
  } else if (target.scalar_type() == at::kLong && target.dim() == 1 && target.is_contiguous()) {
    problem.target = target;
  } else {
    problem.target = target.reshape({problem.rows}).to(at::kLong).contiguous();
  }

  const auto type = accumulation_type(logits.scalar_type());
  const bool weighted = is_there(weight);
  if (weighted) {
    problem.weight = weight->detach().to(type).contiguous();
  }
  // The GPU's kernel computes it, which costs less than a launch.
  if (options.label_smoothing > 0 && problem.classes > 0 && logits.is_cpu()) {
    const double share = options.label_smoothing / static_cast<double>(problem.classes);
    problem.smooth = weighted ? problem.weight * share : full({problem.classes}, share, logits.options().dtype(type));
  }
  return problem;
}

// Returns a gradient laid out as `problem.logits` with the shape and strides that the op promises.
Tensor as_logits_shaped(const Tensor& gradient, const CrossEntropyProblem& problem, const Tensor& logits) {
  if (gradient.sizes() == logits.sizes()) {
    return gradient;
  }
  if (problem.inner > 1 || logits.dim() == 1) {
    return gradient.view(logits.sizes());
  }
  auto sizes = loss_sizes(logits);
  sizes.push_back(problem.classes);
  const Tensor shaped = gradient.view(sizes).movedim(-1, class_dim(logits));
  return logits.is_contiguous() ? shaped.contiguous() : shaped;
}

}  // namespace

Results run_forward(
    const CrossEntropyDevice& device,
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    const CrossEntropyOptions& options,
    bool with_gradient,
    bool with_lse) {
  const auto problem = make_problem(logits, target, weight, options, device.max_strided_classes);
  const Tensor gradient = with_gradient ? device.empty_like(problem.logits) : Tensor();
  auto [loss, lse] = device.run(problem, logits, options, gradient, with_lse);
  return {loss, lse, with_gradient ? as_logits_shaped(gradient, problem, logits) : empty({0}, logits.options())};
}

std::tuple<Tensor, Tensor> run_forward_inplace(
    const CrossEntropyDevice& device,
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    const CrossEntropyOptions& options,
    bool with_lse) {
  const auto problem = make_problem(logits, target, weight, options, device.max_strided_classes);
  auto results = device.run(problem, logits, options, problem.logits, with_lse);
  if (problem.logits.data_ptr() != logits.data_ptr()) {
    // The logits were copied into rows.
    logits.copy_(as_logits_shaped(problem.logits, problem, logits));
  }
  return results;
}

}  // namespace lightkit
