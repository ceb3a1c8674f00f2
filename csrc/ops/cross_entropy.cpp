// lightkit::cross_entropy: schema, shapes for tracing, and autograd.
//
// Training goes through lightkit::_cross_entropy_forward with `with_gradient`: it reads the logits once and
// writes loss and gradient; backward then only applies the upstream gradient, and nothing where that is 1.

#include "autograd_node.h"
#include "checks.h"
#include "cross_entropy_checks.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <string>
#include <utility>

namespace lightkit {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

Results forward_meta(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse) {
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  check_arguments(logits, target, weight, options);
  const auto sizes = without_classes(logits, logits.sym_sizes());
  const auto loss_options = logits.options().dtype(dtype.value_or(logits.scalar_type()));
  const auto lse_options = logits.options().dtype(accumulation_type(logits.scalar_type()));
  Tensor loss = options.reduction == Reduction::None ? at::empty_symint(sizes, loss_options)
                                                     : at::empty_symint({}, loss_options);
  Tensor lse = with_lse ? at::empty_symint(sizes, lse_options) : at::empty_symint({0}, lse_options);
  if (!with_gradient) {
    return {loss, lse, at::empty_symint({0}, logits.options())};
  }
  if (logits.is_contiguous()) {
    return {loss, lse, at::empty_symint(logits.sym_sizes(), logits.options())};
  }
  auto row_sizes = sizes;
  row_sizes.push_back(logits.sym_size(class_dim(logits)));
  return {loss, lse, at::empty_symint(row_sizes, logits.options()).movedim(-1, class_dim(logits))};
}

Results call_forward(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_cross_entropy_forward", "")
                             .typed<decltype(forward_meta)>();
  return op.call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_gradient, with_lse);
}

using ForwardInplace = std::tuple<Tensor, Tensor>(
    Tensor&, const Tensor&, const std::optional<Tensor>&, LIGHTKIT_OPTION_PARAMETERS, bool);

std::tuple<Tensor, Tensor> call_forward_inplace(
    Tensor logits, const Tensor& target, const std::optional<Tensor>& weight, LIGHTKIT_OPTION_PARAMETERS, bool with_lse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_cross_entropy_forward_", "")
                             .typed<ForwardInplace>();
  return op.call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_lse);
}

// The same where some tensor's sign is still to be changed. torch's own way with that wants of an op that writes into a
// tensor to return it.
std::tuple<Tensor, Tensor> forward_inplace_negative(
    Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse) {
  TORCH_CHECK_VALUE(
      !logits.is_neg(),
      "cross_entropy: the logits in whose memory the gradient is written must be a tensor without negative bit, got one "
      "whose is_neg() is True");
  const auto positive_weight = is_there(weight) ? std::optional(weight->resolve_neg()) : std::nullopt;
  return call_forward_inplace(logits, target.resolve_neg(), positive_weight, LIGHTKIT_OPTION_ARGUMENTS, with_lse);
}

// lightkit::_apply_upstream_: gradient *= upstream, without touching memory where upstream is 1.
Tensor& apply_upstream_cpu(Tensor& gradient, const Tensor& upstream) {
  check_memory("_apply_upstream_", "the gradient", gradient);
  check_memory("_apply_upstream_", "upstream", upstream);
  const bool is_real = !at::isComplexType(upstream.scalar_type());
  return upstream.dim() == 0 && is_real && upstream.item<double>() == 1 ? gradient : gradient.mul_(upstream);
}

// The gradient written with differentiable operations, for backward with create_graph=True: see
// kernels/cpu/cross_entropy.h for the formula.
Tensor differentiable_gradient(
    const Tensor& logits,
    const Tensor& target,
    const Tensor& weight,
    const Tensor& grad_loss,
    const CrossEntropyOptions& options) {
  const int64_t dim = class_dim(logits);
  const auto type = accumulation_type(logits.scalar_type());
  const Tensor z = logits.to(type);
  const Tensor u = options.softcap > 0 ? options.softcap * at::tanh(z / options.softcap) : z;
  const Tensor p = at::softmax(u, dim);
  std::vector<int64_t> along_classes(logits.dim(), 1);
  along_classes[dim] = -1;
  const Tensor class_weight = (weight.defined() ? weight.to(type) : at::ones({logits.size(dim)}, z.options())).view(along_classes);
  const Tensor smooth = class_weight * (options.label_smoothing / std::max<double>(1, logits.size(dim)));

  Tensor targets;  // hard [c = t] + soft_c
  Tensor counted;  // 1 for the rows that are not ignored
  Tensor denominator;
  if (at::isFloatingType(target.scalar_type())) {
    targets = class_weight * (1 - options.label_smoothing) * target.to(type) + smooth;
    counted = at::ones({}, z.options());
    denominator = at::full({}, static_cast<double>(target.numel() / std::max<int64_t>(1, logits.size(dim))), z.options());
  } else {
    // Not in the target's own type, in which ignore_index might be another number.
    const Tensor indices = target.to(at::kLong).unsqueeze(dim);
    const Tensor valid = indices.ne(options.ignore_index);
    counted = valid.to(type);
    const Tensor index = indices.where(valid, 0);
    const Tensor target_weight = class_weight.expand_as(z).gather(dim, index) * counted;
    targets = at::zeros_like(z).scatter(dim, index, (1 - options.label_smoothing) * target_weight) + smooth * counted;
    denominator = target_weight.sum();
  }
  Tensor total = targets.sum(dim, /*keepdim=*/true);
  if (options.z_loss != 0) {
    total = total + 2 * options.z_loss * counted * at::logsumexp(u, dim, /*keepdim=*/true);
  }
  Tensor gradient = total * p - targets;
  if (options.softcap > 0) {
    gradient = gradient * (1 - (u / options.softcap).square());
  }
  const Tensor upstream = options.reduction == Reduction::None ? grad_loss.unsqueeze(dim)
      : options.reduction == Reduction::Mean                   ? grad_loss / denominator
                                                               : grad_loss;
  return (gradient * upstream).to(logits.scalar_type());
}

// Raises, with the reason, where the gradient cannot take the logits' memory.
void check_inplace(const Tensor& logits) {
  const char* reason = nullptr;
  if (logits.is_leaf()) {
    reason = "they are a leaf: their values would be lost";
  } else if (logits.is_view()) {
    reason = "they are a view: others see the memory, too";
  } else if (!logits.is_contiguous()) {
    reason = "they are not contiguous";
  } else if (logits.storage().use_count() > 1) {
    // A detach(), a NumPy array; or a saved result, which autograd would miss only in backward.
    reason = "something else holds the memory, such as their detach() or a function that keeps its result for backward";
  }
  TORCH_CHECK_VALUE(
      reason == nullptr, "cross_entropy: inplace=True cannot give the memory of these logits to their gradient: ", reason);
}

// The node of the backward graph. It is written out, not made by torch::autograd::Function, whose bookkeeping
// takes longer than a small loss.
class CrossEntropyBackward : public torch::autograd::Node {
 public:
  CrossEntropyOptions options;
  bool inplace;
  SavedVariable logits, target, weight;  // for a second derivative alone; not kept where `inplace`
  Tensor gradient;                       // given away in the first backward, unless that keeps the graph

  variable_list apply(variable_list&& grad_outputs) override {
    const std::lock_guard lock(mutex_);
    const Tensor& grad_loss = grad_outputs[0];
    if (!grad_loss.defined()) {
      return {Tensor()};
    }
    if (at::GradMode::is_enabled()) {
      TORCH_CHECK(!inplace, "cross_entropy: with inplace=True there is no second derivative: the logits are gone");
      return {differentiable_gradient(logits.unpack(), target.unpack(), weight.unpack(), grad_loss, options)};
    }
    TORCH_CHECK(
        gradient.defined(),
        "Trying to backward through the graph a second time: cross_entropy gave its gradient away in the first "
        "backward. Specify retain_graph=True there if you need another.");
    const Tensor upstream = options.reduction == Reduction::None ? grad_loss.unsqueeze(class_dim(gradient)) : grad_loss;
    return {take_gradient(gradient, upstream)};
  }

  std::string name() const override {
    return "CrossEntropyBackward";
  }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    logits.reset_data();
    target.reset_data();
    weight.reset_data();
    gradient = Tensor();
  }
};

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse,
    bool inplace) {
  const auto node = make_node<CrossEntropyBackward>();
  node->options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  node->inplace = inplace;
  node->set_next_edges(torch::autograd::collect_next_edges(logits));
  Tensor loss, lse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (inplace) {
      node->gradient = logits.detach();
      std::tie(loss, lse) = call_forward_inplace(node->gradient, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_lse);
      // Whoever saved the logits for a backward of their own must learn that they are gone.
      logits.unsafeGetTensorImpl()->bump_version();
    } else {
      std::tie(loss, lse, node->gradient) =
          call_forward(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, /*with_gradient=*/true, with_lse);
    }
  }
  if (!inplace) {
    node->logits = SavedVariable(logits, /*is_output=*/false);
    node->target = SavedVariable(target, /*is_output=*/false);
    node->weight = SavedVariable(weight.value_or(Tensor()), /*is_output=*/false);
  }
  torch::autograd::set_history(loss, node);
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool return_lse,
    bool inplace) {
  auto [loss, lse, gradient] =
      call_forward(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, /*with_gradient=*/false, return_lse);
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy_autograd(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool return_lse,
    bool inplace) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    // A compiler plans the memory itself.
    const bool take_memory = inplace && is_concrete(logits);
    if (take_memory) {
      check_inplace(logits);
    }
    return cross_entropy_with_gradient(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, take_memory);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return cross_entropy(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, inplace);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, ScalarType? dtype=None, "
      "bool return_lse=False, bool inplace=False) -> (Tensor loss, Tensor lse)");
  m.def(
      "_cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, ScalarType? dtype, bool with_gradient, bool with_lse) "
      "-> (Tensor loss, Tensor lse, Tensor gradient)");
  m.def(
      "_cross_entropy_forward_(Tensor(a!) logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, ScalarType? dtype, bool with_lse) "
      "-> (Tensor loss, Tensor lse)");
  m.def("_apply_upstream_(Tensor(a!) gradient, Tensor upstream) -> Tensor(a!)");
}

TORCH_LIBRARY_IMPL(lightkit, CPU, m) {
  m.impl("_apply_upstream_", apply_upstream_cpu);
}

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_cross_entropy_forward", forward_meta);
}

TORCH_LIBRARY_IMPL(lightkit, Negative, m) {
  m.impl("_cross_entropy_forward_", forward_inplace_negative);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
}

}  // namespace lightkit
