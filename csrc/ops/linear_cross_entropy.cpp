// lightkit::linear_cross_entropy: schema, shapes for tracing, and autograd.
//
// A loss that is reduced computes its gradients in forward, while it has the logits; backward applies the upstream
// gradient to them. Where every row has its own upstream gradient, and in float16, whose range ends at 6e-8 and
// wants the factor of a GradScaler before anything is rounded, backward computes the logits again.

#include "linear_cross_entropy.h"

#include "autograd_node.h"
#include "checks.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <string>

namespace lightkit {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

// Empty tensors for the gradients.
LinearGradients empty_gradients(const LinearInputs& inputs, const WantedGradients& wanted) {
  const auto make = [](const Tensor& like, bool is_wanted) {
    return is_wanted ? at::empty_symint(like.sym_sizes(), like.options()) : at::empty_symint({0}, like.options());
  };
  return {
      make(inputs.hidden, wanted.hidden),
      make(inputs.linear_weight, wanted.linear_weight),
      make(inputs.linear_bias.value_or(inputs.linear_weight), wanted.linear_bias)};
}

LinearResults forward_meta(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  const auto loss_options = hidden.options().dtype(dtype.value_or(hidden.scalar_type()));
  const auto acc_options = hidden.options().dtype(accumulation_type(hidden.scalar_type()));
  Tensor loss = options.reduction == Reduction::None ? at::empty_symint({hidden.sym_size(0)}, loss_options)
                                                     : at::empty_symint({}, loss_options);
  auto [hidden_gradient, weight_gradient, bias_gradient] = empty_gradients(inputs, wanted);
  const Tensor rows_known = at::empty_symint({3, hidden.sym_size(0)}, acc_options);
  return {loss, rows_known, hidden_gradient, weight_gradient, bias_gradient};
}

LinearGradients backward_meta(
    const Tensor& grad_loss,
    const Tensor& rows_known,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  check_backward_arguments(grad_loss, rows_known, inputs, options);
  return empty_gradients(inputs, wanted);
}

LinearResults call_forward(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_linear_cross_entropy_forward", "")
                             .typed<decltype(forward_meta)>();
  return op.call(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit, LIGHTKIT_WANTED_ARGUMENTS);
}

LinearGradients call_backward(
    const Tensor& grad_loss,
    const Tensor& rows_known,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_linear_cross_entropy_backward", "")
                             .typed<decltype(backward_meta)>();
  return op.call(
      grad_loss,
      rows_known,
      LIGHTKIT_LINEAR_ARGUMENTS,
      LIGHTKIT_OPTION_ARGUMENTS,
      memory_limit,
      LIGHTKIT_WANTED_ARGUMENTS);
}

using CrossEntropy = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, LIGHTKIT_OPTION_PARAMETERS, bool, bool);

// Loss and lse by way of the logits as a whole, in differentiable operations.
std::tuple<Tensor, Tensor> through_logits(const LinearInputs& in, const CrossEntropyOptions& options, bool return_lse) {
  static const auto cross_entropy =
      c10::Dispatcher::singleton().findSchemaOrThrow("lightkit::cross_entropy", "").typed<CrossEntropy>();
  // The kernels take a bias of any type; at::linear does not.
  const auto bias = is_there(in.linear_bias) ? std::optional(in.linear_bias->to(in.hidden.scalar_type())) : std::nullopt;
  return cross_entropy.call(
      at::linear(in.hidden, in.linear_weight, bias),
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

class LinearCrossEntropyBackward : public torch::autograd::Node {
 public:
  CrossEntropyOptions options;
  int64_t memory_limit;
  WantedGradients wanted;
  SavedVariable hidden, linear_weight, target, linear_bias, weight, rows_known;
  // Computed in forward, and given away in the first backward unless that keeps the graph; else undefined.
  Tensor hidden_gradient, weight_gradient, bias_gradient;
  bool computed_in_forward;

  variable_list apply(variable_list&& grad_outputs) override {
    const std::lock_guard lock(mutex_);
    const Tensor& grad_loss = grad_outputs[0];
    if (!grad_loss.defined()) {
      return {Tensor(), Tensor(), Tensor()};
    }
    if (at::GradMode::is_enabled()) {
      return differentiable_gradients(grad_loss);
    }
    if (!computed_in_forward) {
      return gradients_from_new_logits(grad_loss);
    }
    TORCH_CHECK(!wanted.hidden || hidden_gradient.defined(), kGivenAway);
    TORCH_CHECK(!wanted.linear_weight || weight_gradient.defined(), kGivenAway);
    TORCH_CHECK(!wanted.linear_bias || bias_gradient.defined(), kGivenAway);
    const auto take = [&](bool is_wanted, Tensor& gradient) {
      return is_wanted ? take_gradient(gradient, grad_loss) : Tensor();
    };
    return {
        take(wanted.hidden, hidden_gradient),
        take(wanted.linear_weight, weight_gradient),
        take(wanted.linear_bias, bias_gradient)};
  }

  std::string name() const override {
    return "LinearCrossEntropyBackward";
  }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (SavedVariable* saved : {&hidden, &linear_weight, &target, &linear_bias, &weight, &rows_known}) {
      saved->reset_data();
    }
    hidden_gradient = weight_gradient = bias_gradient = Tensor();
  }

 private:
  static constexpr const char* kGivenAway =
      "Trying to backward through the graph a second time: linear_cross_entropy gave its gradients away in the first "
      "backward. Specify retain_graph=True there if you need another.";

  static std::optional<Tensor> as_optional(Tensor tensor) {
    return tensor.defined() ? std::optional(std::move(tensor)) : std::nullopt;
  }

  LinearInputs unpack() {
    return {
        hidden.unpack(),
        linear_weight.unpack(),
        target.unpack(),
        as_optional(linear_bias.unpack()),
        as_optional(weight.unpack())};
  }

  variable_list gradients_from_new_logits(const Tensor& grad_loss) {
    const LinearInputs in = unpack();
    auto [of_hidden, of_weight, of_bias] = call_backward(
        grad_loss,
        rows_known.unpack(),
        in.hidden,
        in.linear_weight,
        in.target,
        in.linear_bias,
        in.weight,
        static_cast<int64_t>(options.reduction),
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.softcap,
        options.dtype,
        memory_limit,
        wanted.hidden,
        wanted.linear_weight,
        wanted.linear_bias);
    return {
        wanted.hidden ? of_hidden : Tensor(),
        wanted.linear_weight ? of_weight : Tensor(),
        wanted.linear_bias ? of_bias : Tensor()};
  }

  // For backward with create_graph=True: through the logits as a whole, whose cross-entropy knows its second
  // derivative.
  variable_list differentiable_gradients(const Tensor& grad_loss) {
    const LinearInputs in = unpack();
    const auto [loss, unused] = through_logits(in, options, /*return_lse=*/false);
    variable_list inputs;
    if (wanted.hidden) {
      inputs.push_back(in.hidden);
    }
    if (wanted.linear_weight) {
      inputs.push_back(in.linear_weight);
    }
    if (wanted.linear_bias) {
      inputs.push_back(*in.linear_bias);
    }
    const variable_list found = torch::autograd::grad(
        {loss}, inputs, {grad_loss}, /*retain_graph=*/std::nullopt, /*create_graph=*/true);
    auto next = found.begin();
    return {
        wanted.hidden ? *next++ : Tensor(),
        wanted.linear_weight ? *next++ : Tensor(),
        wanted.linear_bias ? *next++ : Tensor()};
  }
};

// Reduced losses of a type that keeps small gradients.
bool computes_in_forward(const Tensor& hidden, int64_t reduction) {
  return static_cast<Reduction>(reduction) != Reduction::None && hidden.scalar_type() != at::kHalf;
}

Tensor lse_of(const Tensor& rows_known) {
  return rows_known.select(0, 0) + rows_known.select(0, 1);
}

// Without classes or features the logits take no memory, or are the bias alone.
std::tuple<Tensor, Tensor> empty_linear_cross_entropy(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  check_linear_arguments(inputs, options, memory_limit);
  return through_logits(inputs, options, /*return_lse=*/true);
}

std::tuple<Tensor, Tensor> linear_cross_entropy(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit) {
  if (linear_weight.sym_numel() == 0) {
    return empty_linear_cross_entropy(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit);
  }
  auto [loss, rows_known, hidden_gradient, weight_gradient, bias_gradient] =
      call_forward(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit, false, false, false);
  return {loss, lse_of(rows_known)};
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
    return linear_cross_entropy(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit);
  }
  const auto node = make_node<LinearCrossEntropyBackward>();
  node->options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  node->memory_limit = memory_limit;
  node->wanted = wanted;
  node->computed_in_forward = computes_in_forward(hidden, reduction);
  node->set_next_edges(torch::autograd::collect_next_edges(hidden, linear_weight, has_bias ? *linear_bias : Tensor()));
  const bool now = node->computed_in_forward;
  Tensor loss, rows_known, lse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, rows_known, node->hidden_gradient, node->weight_gradient, node->bias_gradient) = call_forward(
        LIGHTKIT_LINEAR_ARGUMENTS,
        LIGHTKIT_OPTION_ARGUMENTS,
        memory_limit,
        now && wanted.hidden,
        now && wanted.linear_weight,
        now && wanted.linear_bias);
    lse = lse_of(rows_known);
  }
  node->hidden = SavedVariable(hidden, /*is_output=*/false);
  node->linear_weight = SavedVariable(linear_weight, /*is_output=*/false);
  node->target = SavedVariable(target, /*is_output=*/false);
  node->linear_bias = SavedVariable(linear_bias.value_or(Tensor()), /*is_output=*/false);
  node->weight = SavedVariable(weight.value_or(Tensor()), /*is_output=*/false);
  node->rows_known = SavedVariable(now ? Tensor() : rows_known, /*is_output=*/false);
  torch::autograd::set_history(loss, node);
  return {loss, lse};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
#define LIGHTKIT_LINEAR_SCHEMA \
  "Tensor hidden, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
#define LIGHTKIT_OPTION_SCHEMA \
  "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, ScalarType? dtype, "
#define LIGHTKIT_WANTED_SCHEMA "bool hidden_wanted, bool weight_wanted, bool bias_wanted"
  m.def("linear_cross_entropy(" LIGHTKIT_LINEAR_SCHEMA LIGHTKIT_OPTION_SCHEMA
        "int memory_limit) -> (Tensor loss, Tensor lse)");
  m.def("_linear_cross_entropy_forward(" LIGHTKIT_LINEAR_SCHEMA LIGHTKIT_OPTION_SCHEMA
        "int memory_limit, " LIGHTKIT_WANTED_SCHEMA
        ") -> (Tensor loss, Tensor rows_known, Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)");
  m.def("_linear_cross_entropy_backward(Tensor grad_loss, Tensor rows_known, " LIGHTKIT_LINEAR_SCHEMA
        LIGHTKIT_OPTION_SCHEMA "int memory_limit, " LIGHTKIT_WANTED_SCHEMA
        ") -> (Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)");
}

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_linear_cross_entropy_forward", forward_meta);
  m.impl("_linear_cross_entropy_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autograd);
}

}  // namespace lightkit
