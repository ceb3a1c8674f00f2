// lightkit::linear_cross_entropy: the Meta kernels and autograd.
//
// A reduced loss computes its gradients in forward, while it has the logits, and backward applies the upstream
// gradient. backward computes the logits again for an unreduced loss, whose rows have an upstream gradient each, and in
// float16, whose smallest number is 6e-8, so that the factor of a GradScaler must come before the rounding.

#include "linear_cross_entropy.h"

#include "../common/autograd_node.h"
#include "../common/checks.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <memory>
#include <utility>

namespace lightkit {

using at::Tensor;

namespace {

// Returns uninitialised gradients.
LinearGradients empty_gradients(const LinearInputs& inputs, const WantedGradients& wanted) {
  const auto make = [](const Tensor& like, bool is_wanted) {
    return is_wanted ? empty_symint(like.sym_sizes(), like.options()) : empty_symint({0}, like.options());
  };
  return {
      make(inputs.hidden, wanted.hidden),
      make(inputs.linear_weight, wanted.linear_weight),
      make(inputs.linear_bias.value_or(inputs.linear_weight), wanted.linear_bias)};
}

}  // namespace

LinearResults linear_forward_meta(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  const auto loss_options = hidden.options().dtype(dtype.value_or(hidden.scalar_type()));
  const auto acc_options = hidden.options().dtype(accumulation_type(hidden.scalar_type()));
  Tensor loss = options.reduction == Reduction::None ? empty_symint({hidden.sym_size(0)}, loss_options)
                                                     : empty_symint({}, loss_options);
  auto [hidden_gradient, weight_gradient, bias_gradient] = empty_gradients(inputs, wanted);
  const Tensor row_statistics = empty_symint({3, hidden.sym_size(0)}, acc_options);
  return {loss, row_statistics, hidden_gradient, weight_gradient, bias_gradient};
}

LinearGradients linear_backward_meta(
    const Tensor& grad_loss,
    const Tensor& row_statistics,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  check_backward_arguments(grad_loss, row_statistics, inputs, options);
  return empty_gradients(inputs, wanted);
}

namespace {

// Returns loss and lse, computed through all logits in differentiable ops.
std::tuple<Tensor, Tensor> through_logits(const LinearInputs& in, const CrossEntropyOptions& options, bool return_lse) {
  // The kernels take a bias of any dtype; at::linear does not.
  const auto bias =
      is_there(in.linear_bias) ? std::optional(in.linear_bias->to(in.hidden.scalar_type())) : std::nullopt;
  return call_cross_entropy(
      linear(in.hidden, in.linear_weight, bias),
      in.target,
      in.weight,
      static_cast<int64_t>(options.reduction),
      options.ignore_index,
      options.label_smoothing,
      options.z_loss,
      options.softcap,
      options.dtype,
      return_lse,
      /*inplace=*/false);
}

class LinearCrossEntropyBackward : public Backward {
 public:
  LinearCrossEntropyBackward(
      const CrossEntropyOptions& options, int64_t memory_limit, const WantedGradients& wanted, bool computed_in_forward)
      : options_(options), memory_limit_(memory_limit), wanted_(wanted), computed_in_forward_(computed_in_forward) {}

  // Computed in forward, or undefined; undefined after the first backward, unless that keeps the graph.
  Tensor hidden_gradient, weight_gradient, bias_gradient;

  const char* name() const override {
    return "LinearCrossEntropyBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_loss) override {
    if (!grad_loss.defined()) {
      return {Tensor(), Tensor(), Tensor()};
    }
    if (at::GradMode::is_enabled()) {
      return differentiable_gradients(grad_loss);
    }
    if (!computed_in_forward_) {
      return gradients_from_new_logits(grad_loss);
    }
    TORCH_CHECK(!wanted_.hidden || hidden_gradient.defined(), kGivenAway);
    TORCH_CHECK(!wanted_.linear_weight || weight_gradient.defined(), kGivenAway);
    TORCH_CHECK(!wanted_.linear_bias || bias_gradient.defined(), kGivenAway);
    const auto take = [&](bool is_wanted, Tensor& gradient) {
      return is_wanted ? take_gradient(gradient, grad_loss) : Tensor();
    };
    return {
        take(wanted_.hidden, hidden_gradient),
        take(wanted_.linear_weight, weight_gradient),
        take(wanted_.linear_bias, bias_gradient)};
  }

  void release() override {
    hidden_gradient = weight_gradient = bias_gradient = Tensor();
  }

 private:
  static constexpr const char* kGivenAway =
      "Trying to backward through the graph a second time: linear_cross_entropy gave its gradients away in the first "
      "backward. Specify retain_graph=True there if you need another.";

  static std::optional<Tensor> as_optional(Tensor tensor) {
    return tensor.defined() ? std::optional(std::move(tensor)) : std::nullopt;
  }

  LinearInputs inputs() const {
    return {saved(0), saved(1), saved(2), as_optional(saved(3)), as_optional(saved(4))};
  }

  std::vector<Tensor> gradients_from_new_logits(const Tensor& grad_loss) const {
    const LinearInputs in = inputs();
    auto [of_hidden, of_weight, of_bias] = call_linear_backward(
        grad_loss,
        saved(5),
        in.hidden,
        in.linear_weight,
        in.target,
        in.linear_bias,
        in.weight,
        static_cast<int64_t>(options_.reduction),
        options_.ignore_index,
        options_.label_smoothing,
        options_.z_loss,
        options_.softcap,
        options_.dtype,
        memory_limit_,
        wanted_.hidden,
        wanted_.linear_weight,
        wanted_.linear_bias);
    return {
        wanted_.hidden ? of_hidden : Tensor(),
        wanted_.linear_weight ? of_weight : Tensor(),
        wanted_.linear_bias ? of_bias : Tensor()};
  }

  // For backward with create_graph=True: through all logits, whose cross-entropy has a second derivative.
  std::vector<Tensor> differentiable_gradients(const Tensor& grad_loss) const {
    const LinearInputs in = inputs();
    const auto [loss, unused] = through_logits(in, options_, /*return_lse=*/false);
    std::vector<Tensor> inputs;
    if (wanted_.hidden) {
      inputs.push_back(in.hidden);
    }
    if (wanted_.linear_weight) {
      inputs.push_back(in.linear_weight);
    }
    if (wanted_.linear_bias) {
      inputs.push_back(*in.linear_bias);
    }
    const auto found = differentiate(loss, inputs, grad_loss, /*create_graph=*/true);
    auto next = found.begin();
    return {
        wanted_.hidden ? *next++ : Tensor(),
        wanted_.linear_weight ? *next++ : Tensor(),
        wanted_.linear_bias ? *next++ : Tensor()};
  }

  const CrossEntropyOptions options_;
  const int64_t memory_limit_;
  const WantedGradients wanted_;
  const bool computed_in_forward_;
};

// Returns true for reduced losses of a dtype that keeps small gradients.
bool computes_in_forward(const Tensor& hidden, int64_t reduction) {
  return static_cast<Reduction>(reduction) != Reduction::None && hidden.scalar_type() != at::kHalf;
}

Tensor lse_of(const Tensor& row_statistics) {
  return row_statistics.select(0, 0) + row_statistics.select(0, 1);
}

// Without classes the logits take no memory; without features they are the bias.
std::tuple<Tensor, Tensor> empty_linear_cross_entropy(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  check_linear_arguments(inputs, options, memory_limit);
  return through_logits(inputs, options, /*return_lse=*/true);
}

}  // namespace

std::tuple<Tensor, Tensor> linear_cross_entropy_below_autograd(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit) {
  if (linear_weight.sym_numel() == 0) {
    return empty_linear_cross_entropy(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit);
  }
  auto [loss, row_statistics, hidden_gradient, weight_gradient, bias_gradient] =
      call_linear_forward(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit, false, false, false);
  return {loss, lse_of(row_statistics)};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_autograd(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit) {
  if (linear_weight.sym_numel() == 0) {
    return empty_linear_cross_entropy(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit);
  }
  const bool has_bias = is_there(linear_bias);
  const bool grad_mode = at::GradMode::is_enabled();
  const WantedGradients wanted{
      grad_mode && hidden.requires_grad(),
      grad_mode && linear_weight.requires_grad(),
      grad_mode && has_bias && linear_bias->requires_grad()};
  if (!wanted.any()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_cross_entropy_below_autograd(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit);
  }
  const bool now = computes_in_forward(hidden, reduction);
  auto backward = std::make_unique<LinearCrossEntropyBackward>(
      make_options(LIGHTKIT_OPTION_ARGUMENTS), memory_limit, wanted, /*computed_in_forward=*/now);
  Tensor loss, row_statistics, lse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, row_statistics, backward->hidden_gradient, backward->weight_gradient, backward->bias_gradient) =
        call_linear_forward(
            LIGHTKIT_LINEAR_ARGUMENTS,
            LIGHTKIT_OPTION_ARGUMENTS,
            memory_limit,
            now && wanted.hidden,
            now && wanted.linear_weight,
            now && wanted.linear_bias);
    lse = lse_of(row_statistics);
  }
  const Tensor bias = linear_bias.value_or(Tensor());
  record(
      loss,
      std::move(backward),
      {hidden, linear_weight, bias},
      {hidden, linear_weight, target, bias, weight.value_or(Tensor()), now ? Tensor() : row_statistics});
  return {loss, lse};
}

}  // namespace lightkit
