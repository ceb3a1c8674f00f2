// lightkit::cross_entropy: the Meta kernel and autograd.
//
// Training calls lightkit::_cross_entropy_forward with `with_gradient`, which reads the logits once, and writes loss
// and gradient. backward applies the upstream gradient, and does nothing if that is 1.

#include "../common/autograd_node.h"
#include "../common/checks.h"
#include "../common/tensors.h"
#include "cross_entropy_checks.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <memory>
#include <tuple>
#include <utility>

namespace lightkit {

using at::Tensor;

Results cross_entropy_forward_meta(
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
  Tensor loss =
      options.reduction == Reduction::None ? empty_symint(sizes, loss_options) : empty_symint({}, loss_options);
  Tensor lse = with_lse ? empty_symint(sizes, lse_options) : empty_symint({0}, lse_options);
  if (!with_gradient) {
    return {loss, lse, empty_symint({0}, logits.options())};
  }
  if (logits.is_contiguous()) {
    return {loss, lse, empty_symint(logits.sym_sizes(), logits.options())};
  }
  auto row_sizes = sizes;
  row_sizes.push_back(logits.sym_size(class_dim(logits)));
  return {loss, lse, empty_symint(row_sizes, logits.options()).movedim(-1, class_dim(logits))};
}

// Resolves pending negations. torch's fallback for them requires that an op returns the tensor that it writes to.
std::tuple<Tensor, Tensor> cross_entropy_inplace_negative(
    Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse) {
  TORCH_CHECK_VALUE(
      !logits.is_neg(),
      "cross_entropy: the logits in whose memory the gradient is written must be a tensor without negative bit, "
      "got one whose is_neg() is True");
  const auto positive_weight = is_there(weight) ? std::optional(weight->resolve_neg()) : std::nullopt;
  return call_cross_entropy_inplace(logits, target.resolve_neg(), positive_weight, LIGHTKIT_OPTION_ARGUMENTS, with_lse);
}

namespace {

// Returns true for a scalar that is 1, of the types that a loss has.
bool is_one(const Tensor& tensor) {
  if (tensor.dim() != 0) {
    return false;
  }
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return *tensor.const_data_ptr<float>() == 1;
    case at::kDouble:
      return *tensor.const_data_ptr<double>() == 1;
    case at::kBFloat16:
      return *tensor.const_data_ptr<at::BFloat16>() == 1;
    case at::kHalf:
      return *tensor.const_data_ptr<at::Half>() == 1;
    default:
      return false;
  }
}

}  // namespace

Tensor& apply_upstream_cpu(Tensor& gradient, const Tensor& upstream) {
  check_memory("_apply_upstream_", "the gradient", gradient);
  check_memory("_apply_upstream_", "upstream", upstream);
  return is_one(upstream) ? gradient : gradient.mul_(upstream);
}

namespace {

// Returns the gradient in differentiable ops, for backward with create_graph=True.
// kernels/cpu/cross_entropy/cross_entropy.h has the formula.
Tensor differentiable_gradient(
    const Tensor& logits,
    const Tensor& target,
    const Tensor& weight,
    const Tensor& grad_loss,
    const CrossEntropyOptions& options) {
  const int64_t dim = class_dim(logits);
  const auto type = accumulation_type(logits.scalar_type());
  const Tensor z = logits.to(type);
  const Tensor u = options.softcap > 0 ? options.softcap * (z / options.softcap).tanh() : z;
  const Tensor p = u.softmax(dim);
  std::vector<int64_t> along_classes(logits.dim(), 1);
  along_classes[dim] = -1;
  const Tensor class_weight =
      (weight.defined() ? weight.to(type) : full({logits.size(dim)}, 1, z.options())).view(along_classes);
  const Tensor smooth = class_weight * (options.label_smoothing / std::max<double>(1, logits.size(dim)));

  Tensor targets;  // hard [c = t] + soft_c
  Tensor counted;  // 0 for ignored rows, else 1
  Tensor denominator;
  if (at::isFloatingType(target.scalar_type())) {
    targets = class_weight * (1 - options.label_smoothing) * target.to(type) + smooth;
    counted = full({}, 1, z.options());
    denominator = full({}, static_cast<double>(target.numel() / std::max<int64_t>(1, logits.size(dim))), z.options());
  } else {
    // In the target's own dtype, ignore_index might be another number.
    const Tensor indices = target.to(at::kLong).unsqueeze(dim);
    const Tensor valid = indices.ne(options.ignore_index);
    counted = valid.to(type);
    const Tensor index = indices.where(valid, 0);
    const Tensor target_weight = class_weight.expand_as(z).gather(dim, index) * counted;
    targets = zeros_like(z).scatter(dim, index, (1 - options.label_smoothing) * target_weight) + smooth * counted;
    denominator = target_weight.sum();
  }
  Tensor total = targets.sum(dim, /*keepdim=*/true);
  if (options.z_loss != 0) {
    total = total + 2 * options.z_loss * counted * u.logsumexp(dim, /*keepdim=*/true);
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

// Raises a ValueError with the reason if the gradient cannot take the memory of the logits.
void check_inplace(const Tensor& logits) {
  const char* reason = nullptr;
  if (logits.is_leaf()) {
    reason = "they are a leaf: their values would be lost";
  } else if (logits.is_view()) {
    reason = "they are a view: others see the memory, too";
  } else if (!logits.is_contiguous()) {
    reason = "they are not contiguous";
  } else if (logits.storage().use_count() > 1) {
    // A detach(), a NumPy array, or a saved result, whose loss autograd would notice only in backward.
    reason = "something else holds the memory, such as their detach() or a function that keeps its result for backward";
  }
  TORCH_CHECK_VALUE(
      reason == nullptr,
      "cross_entropy: inplace=True cannot give the memory of these logits to their gradient: ",
      reason);
}

class CrossEntropyBackward : public Backward {
 public:
  CrossEntropyBackward(const CrossEntropyOptions& options, bool inplace) : options_(options), inplace_(inplace) {}

  Tensor gradient;  // undefined after the first backward, unless that keeps the graph

  const char* name() const override {
    return "CrossEntropyBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_loss) override {
    if (!grad_loss.defined()) {
      return {Tensor()};
    }
    if (at::GradMode::is_enabled()) {
      TORCH_CHECK(!inplace_, "cross_entropy: with inplace=True there is no second derivative: the logits are gone");
      return {differentiable_gradient(saved(0), saved(1), saved(2), grad_loss, options_)};
    }
    TORCH_CHECK(
        gradient.defined(),
        "Trying to backward through the graph a second time: cross_entropy gave its gradient away in the first "
        "backward. Specify retain_graph=True there if you need another.");
    const bool each = options_.reduction == Reduction::None;
    return {take_gradient(gradient, each ? grad_loss.unsqueeze(class_dim(gradient)) : grad_loss)};
  }

  void release() override {
    gradient = Tensor();
  }

 private:
  const CrossEntropyOptions options_;
  const bool inplace_;
};

// Calls lightkit::_cross_entropy_forward.
Results forward(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse) {
  const bool direct = is_direct(logits) && is_direct(target) && (!is_there(weight) || is_direct(*weight));
  const auto call = direct ? cross_entropy_forward_cpu : call_cross_entropy_forward;
  return call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_gradient, with_lse);
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse,
    bool inplace) {
  auto backward = std::make_unique<CrossEntropyBackward>(make_options(LIGHTKIT_OPTION_ARGUMENTS), inplace);
  Tensor loss, lse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (inplace) {
      backward->gradient = logits.detach();
      std::tie(loss, lse) =
          call_cross_entropy_inplace(backward->gradient, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_lse);
      // Tells functions that saved the logits for their backward that the values are lost.
      logits.unsafeGetTensorImpl()->bump_version();
    } else {
      std::tie(loss, lse, backward->gradient) =
          forward(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, /*with_gradient=*/true, with_lse);
    }
  }
  if (inplace) {
    record(loss, std::move(backward), {logits}, {});
  } else {
    // The second derivative needs these tensors.
    record(loss, std::move(backward), {logits}, {logits, target, weight.value_or(Tensor())});
  }
  return {loss, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_below_autograd(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool return_lse,
    bool inplace) {
  auto [loss, lse, gradient] =
      forward(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, /*with_gradient=*/false, return_lse);
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
    // Under a tracer the compiler plans the memory.
    const bool take_memory = inplace && is_concrete(logits);
    if (take_memory) {
      check_inplace(logits);
    }
    return cross_entropy_with_gradient(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, take_memory);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return cross_entropy_below_autograd(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, inplace);
}

}  // namespace lightkit
