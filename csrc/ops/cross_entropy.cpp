// lightkit::cross_entropy: schema, checks, CPU dispatch, shapes for tracing, and autograd.
//
// Training goes through lightkit::_cross_entropy_forward with `with_gradient`: it reads the logits once and
// writes loss and gradient; backward then only applies the upstream gradient, and nothing where that is 1.

#include "cross_entropy.h"

#include "../kernels/cpu/cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>

namespace lightkit {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

int64_t class_dim(const Tensor& logits) {
  return logits.dim() == 1 ? 0 : 1;
}

// The shape of the unreduced loss: that of the logits without the classes.
template <typename Sizes>
auto batch_sizes(const Tensor& logits, const Sizes& sizes) {
  auto result = sizes.vec();
  result.erase(result.begin() + class_dim(logits));
  return result;
}

void check_arguments(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    double label_smoothing) {
  TORCH_CHECK_VALUE(logits.dim() >= 1, "cross_entropy: the logits must have at least one dimension, got a scalar");
  TORCH_CHECK(
      at::isFloatingType(logits.scalar_type()) && logits.element_size() > 1,
      "cross_entropy: the logits must be float32, float64, bfloat16 or float16, got ",
      logits.scalar_type());
  TORCH_CHECK(
      !at::isFloatingType(target.scalar_type()) && !at::isComplexType(target.scalar_type()) &&
          target.scalar_type() != at::kBool,
      "cross_entropy: class indices must be int64, int32 or uint8, got ",
      target.scalar_type());
  const auto expected = batch_sizes(logits, logits.sym_sizes());
  TORCH_CHECK_VALUE(
      target.sym_sizes() == c10::SymIntArrayRef(expected),
      "cross_entropy: for logits of shape ",
      logits.sym_sizes(),
      " the target must have shape ",
      c10::SymIntArrayRef(expected),
      ", got ",
      target.sym_sizes());
  TORCH_CHECK(
      target.device() == logits.device(),
      "cross_entropy: the target is on ",
      target.device(),
      " but the logits are on ",
      logits.device());
  TORCH_CHECK_VALUE(
      reduction >= 0 && reduction <= 2, "cross_entropy: reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  TORCH_CHECK(
      label_smoothing >= 0.0 && label_smoothing <= 1.0,
      "cross_entropy: label_smoothing must be between 0.0 and 1.0, got ",
      label_smoothing);
  if (weight.has_value() && weight->defined()) {
    TORCH_CHECK(
        weight->dim() == 1 && weight->sym_size(0) == logits.sym_size(class_dim(logits)),
        "cross_entropy: weight must hold one value for each of the ",
        logits.sym_size(class_dim(logits)),
        " classes, got shape ",
        weight->sym_sizes());
    TORCH_CHECK(
        at::isFloatingType(weight->scalar_type()), "cross_entropy: weight must be floating point, got ", weight->scalar_type());
    TORCH_CHECK(
        weight->device() == logits.device(),
        "cross_entropy: weight is on ",
        weight->device(),
        " but the logits are on ",
        logits.device());
  }
}

}  // namespace

CrossEntropyProblem make_problem(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    double label_smoothing) {
  check_arguments(logits, target, weight, reduction, label_smoothing);
  CrossEntropyProblem problem;
  problem.classes = logits.size(class_dim(logits));
  problem.rows = target.numel();
  // Rows are counted by the target: reshape(-1, 0) could not say how many there are.
  problem.logits = logits.movedim(class_dim(logits), -1).reshape({problem.rows, problem.classes}).contiguous();
  problem.target = target.reshape({problem.rows}).to(at::kLong).contiguous();

  const auto type = accumulation_type(logits.scalar_type());
  const bool weighted = weight.has_value() && weight->defined();
  if (weighted) {
    problem.weight = weight->detach().to(type).contiguous();
  }
  problem.smooth_sum = 0;
  if (label_smoothing > 0 && problem.classes > 0) {
    const double share = label_smoothing / static_cast<double>(problem.classes);
    problem.smooth = weighted ? problem.weight * share : at::full({problem.classes}, share, logits.options().dtype(type));
    if (!weighted) {
      problem.smooth_sum = label_smoothing;
    } else if (logits.is_cpu()) {
      problem.smooth_sum = problem.smooth.sum(at::kDouble).item<double>();
    } else {
      problem.smooth_sum = std::numeric_limits<double>::quiet_NaN();
    }
  }
  return problem;
}

Tensor unflatten_rows(const Tensor& rows, const Tensor& logits) {
  auto sizes = batch_sizes(logits, logits.sizes());
  sizes.push_back(logits.size(class_dim(logits)));
  return rows.view(sizes).movedim(-1, class_dim(logits));
}

namespace {

// Checks every target and returns what a mean divides by: the summed weight of the rows that count.
template <typename acc_t>
double check_targets(const CrossEntropyProblem& problem, int64_t ignore_index) {
  const int64_t* target = problem.target.const_data_ptr<int64_t>();
  const acc_t* weight = problem.weight.defined() ? problem.weight.const_data_ptr<acc_t>() : nullptr;
  double total = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (target[row] == ignore_index) {
      continue;
    }
    TORCH_CHECK_INDEX(
        target[row] >= 0 && target[row] < problem.classes,
        "cross_entropy: Target ",
        target[row],
        " is out of bounds: row ",
        row,
        " of the target must name one of the ",
        problem.classes,
        " classes (0 to ",
        problem.classes - 1,
        ") or be ignore_index (",
        ignore_index,
        ")");
    total += weight == nullptr ? 1.0 : static_cast<double>(weight[target[row]]);
  }
  return total;
}

// In an order that depends on the count alone, so that the loss is the same whatever the number of threads.
template <typename acc_t>
double ordered_sum(const acc_t* values, int64_t count) {
  constexpr int64_t lanes = 8;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t k = 0; k < lanes; ++k) {
      sums[k] += values[i + k];
    }
  }
  for (; i < count; ++i) {
    sums[i % lanes] += values[i];
  }
  return std::accumulate(sums, sums + lanes, 0.0);
}

template <typename scalar_t>
LossAndGradient run_cpu(
    const CrossEntropyProblem& problem,
    const Tensor& logits,
    Reduction reduction,
    int64_t ignore_index,
    double label_smoothing,
    bool with_gradient,
    at::ScalarType loss_type) {
  using acc_t = cpu::accumulator_t<scalar_t>;
  const double denominator = check_targets<acc_t>(problem, ignore_index);
  const Tensor losses = at::empty({problem.rows}, logits.options().dtype(accumulation_type(logits.scalar_type())));
  const Tensor gradient = with_gradient ? at::empty_like(problem.logits) : at::empty({0}, logits.options());

  cpu::cross_entropy<scalar_t>({
      .logits = problem.logits.const_data_ptr<scalar_t>(),
      .rows = problem.rows,
      .classes = problem.classes,
      .target = problem.target.const_data_ptr<int64_t>(),
      .ignore_index = ignore_index,
      .weight = problem.weight.defined() ? problem.weight.const_data_ptr<acc_t>() : nullptr,
      .smooth = problem.smooth.defined() ? problem.smooth.const_data_ptr<acc_t>() : nullptr,
      .smooth_sum = static_cast<acc_t>(problem.smooth_sum),
      .confidence = static_cast<acc_t>(1 - label_smoothing),
      .gradient_scale = static_cast<acc_t>(reduction == Reduction::Mean ? 1 / denominator : 1),
      .losses = losses.mutable_data_ptr<acc_t>(),
      .gradient = with_gradient ? gradient.mutable_data_ptr<scalar_t>() : nullptr,
  });

  const Tensor shaped_gradient = with_gradient ? unflatten_rows(gradient, logits) : gradient;
  if (reduction == Reduction::None) {
    return {losses.view(batch_sizes(logits, logits.sizes())).to(loss_type), shaped_gradient};
  }
  double loss = ordered_sum(losses.const_data_ptr<acc_t>(), problem.rows);
  if (reduction == Reduction::Mean) {
    loss /= denominator;
  }
  return {at::scalar_tensor(loss, logits.options().dtype(loss_type)), shaped_gradient};
}

LossAndGradient forward_cpu(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index,
    double label_smoothing,
    std::optional<at::ScalarType> dtype,
    bool with_gradient) {
  const auto problem = make_problem(logits, target, weight, reduction, label_smoothing);
  const auto run = [&](auto zero) {
    return run_cpu<decltype(zero)>(
        problem,
        logits,
        static_cast<Reduction>(reduction),
        ignore_index,
        label_smoothing,
        with_gradient,
        dtype.value_or(logits.scalar_type()));
  };
  switch (logits.scalar_type()) {
    case at::kFloat:
      return run(float());
    case at::kDouble:
      return run(double());
    case at::kBFloat16:
      return run(at::BFloat16());
    default:
      return run(at::Half());
  }
}

LossAndGradient forward_meta(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index,
    double label_smoothing,
    std::optional<at::ScalarType> dtype,
    bool with_gradient) {
  check_arguments(logits, target, weight, reduction, label_smoothing);
  const auto sizes = batch_sizes(logits, logits.sym_sizes());
  const auto loss_options = logits.options().dtype(dtype.value_or(logits.scalar_type()));
  Tensor loss = static_cast<Reduction>(reduction) == Reduction::None ? at::empty_symint(sizes, loss_options)
                                                                    : at::empty_symint({}, loss_options);
  if (!with_gradient) {
    return {loss, at::empty_symint({0}, logits.options())};
  }
  auto row_sizes = sizes;
  row_sizes.push_back(logits.sym_size(class_dim(logits)));
  return {loss, at::empty_symint(row_sizes, logits.options()).movedim(-1, class_dim(logits))};
}

LossAndGradient call_forward(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index,
    double label_smoothing,
    std::optional<at::ScalarType> dtype,
    bool with_gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_cross_entropy_forward", "")
                             .typed<decltype(forward_cpu)>();
  return op.call(logits, target, weight, reduction, ignore_index, label_smoothing, dtype, with_gradient);
}

// The gradient written with differentiable operations, for backward with create_graph=True.
Tensor differentiable_gradient(
    const Tensor& logits,
    const Tensor& target,
    const Tensor& weight,
    const Tensor& grad_loss,
    Reduction reduction,
    int64_t ignore_index,
    double label_smoothing) {
  const int64_t dim = class_dim(logits);
  const auto type = accumulation_type(logits.scalar_type());
  const Tensor p = at::softmax(logits, dim, type);
  const Tensor valid = target.ne(ignore_index);
  const Tensor index = at::where(valid, target, 0).to(at::kLong);
  const Tensor class_weight =
      weight.defined() ? weight.to(type) : at::ones_symint({logits.sym_size(dim)}, logits.options().dtype(type));
  const Tensor target_weight = class_weight.index({index}) * valid;
  const Tensor smooth = class_weight * (label_smoothing / static_cast<double>(std::max<int64_t>(logits.size(dim), 1)));

  std::vector<int64_t> along_classes(logits.dim(), 1);
  along_classes[dim] = -1;
  const Tensor one_hot =
      at::zeros_like(p).scatter(dim, index.unsqueeze(dim), 1.0);
  const Tensor confident = ((1 - label_smoothing) * target_weight).unsqueeze(dim);
  Tensor gradient = (confident + smooth.sum() * valid.unsqueeze(dim)) * p - confident * one_hot -
      valid.unsqueeze(dim) * smooth.view(along_classes);
  if (reduction == Reduction::None) {
    gradient = gradient * grad_loss.unsqueeze(dim);
  } else {
    gradient = gradient * (reduction == Reduction::Mean ? grad_loss / target_weight.sum() : grad_loss);
  }
  return gradient.to(logits.scalar_type());
}

// Whether operations on `tensor` run now on its memory, rather than being recorded by a tracer.
bool is_concrete(const Tensor& tensor) {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      !tensor.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

// lightkit::_apply_upstream_: gradient *= upstream, without touching memory where upstream is 1.
Tensor& apply_upstream_cpu(Tensor& gradient, const Tensor& upstream) {
  return upstream.dim() == 0 && upstream.item<double>() == 1 ? gradient : gradient.mul_(upstream);
}

Tensor call_apply_upstream(Tensor gradient, const Tensor& upstream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_apply_upstream_", "")
                             .typed<decltype(apply_upstream_cpu)>();
  return op.call(gradient, upstream);
}

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& logits,
      const Tensor& target,
      const std::optional<Tensor>& weight,
      int64_t reduction,
      int64_t ignore_index,
      double label_smoothing,
      std::optional<at::ScalarType> dtype) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, gradient] =
        call_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype, /*with_gradient=*/true);
    // The logits serve only a second derivative. The gradient is not a saved variable: backward gives it away.
    ctx->save_for_backward({logits, target, weight.value_or(Tensor())});
    ctx->saved_data["gradient"] = gradient;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto reduction = static_cast<Reduction>(ctx->saved_data["reduction"].toInt());
    const Tensor& grad_loss = grad_outputs[0];
    Tensor grad_logits;
    if (!grad_loss.defined()) {
      // Nothing flows back.
    } else if (at::GradMode::is_enabled()) {
      const auto saved = ctx->get_saved_variables();
      grad_logits = differentiable_gradient(
          saved[0],
          saved[1],
          saved[2],
          grad_loss,
          reduction,
          ctx->saved_data["ignore_index"].toInt(),
          ctx->saved_data["label_smoothing"].toDouble());
    } else {
      const auto found = ctx->saved_data.find("gradient");
      TORCH_CHECK(
          found != ctx->saved_data.end(),
          "Trying to backward through the graph a second time: cross_entropy gave its gradient away in the first "
          "backward. Specify retain_graph=True there if you need another.");
      const Tensor gradient = found->second.toTensor();
      const Tensor upstream = reduction == Reduction::None ? grad_loss.unsqueeze(class_dim(gradient)) : grad_loss;
      if (is_concrete(gradient) && !torch::autograd::get_current_graph_task_keep_graph()) {
        ctx->saved_data.erase(found);
        grad_logits = call_apply_upstream(gradient, upstream);
      } else {
        grad_logits = (gradient * upstream).to(gradient.scalar_type());
      }
    }
    return {grad_logits, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor cross_entropy(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index,
    double label_smoothing,
    std::optional<at::ScalarType> dtype) {
  return std::get<0>(
      call_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype, /*with_gradient=*/false));
}

Tensor cross_entropy_autograd(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index,
    double label_smoothing,
    std::optional<at::ScalarType> dtype) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    return CrossEntropy::apply(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0, ScalarType? dtype=None) -> Tensor");
  m.def(
      "_cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType? dtype, bool with_gradient) -> (Tensor loss, Tensor gradient)");
  m.def("_apply_upstream_(Tensor(a!) gradient, Tensor upstream) -> Tensor(a!)");
}

TORCH_LIBRARY_IMPL(lightkit, CPU, m) {
  m.impl("_cross_entropy_forward", forward_cpu);
  m.impl("_apply_upstream_", apply_upstream_cpu);
}

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_cross_entropy_forward", forward_meta);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
}

}  // namespace lightkit
