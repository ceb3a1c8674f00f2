// lightkit::norm_act: the Meta kernels and autograd.

#include "norm_act.h"

#include "../../kernels/cpu/norm_act/activation.h"
#include "../common/autograd_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <memory>

namespace lightkit {

using at::Tensor;
using cpu::norm_act::Pool;

NormResults norm_forward_meta(LIGHTKIT_NORM_PARAMETERS, bool keep) {
  return allocate_norm_results(input, check_norm(LIGHTKIT_NORM_ARGUMENTS), keep);
}

NormResults norm_forward_negative(LIGHTKIT_NORM_PARAMETERS, bool keep) {
  for (const auto* running : {&running_mean, &running_var}) {
    TORCH_CHECK_VALUE(
        !is_there(*running) || !(*running)->is_neg(),
        "norm_act: running_mean and running_var must be tensors without negative bit, because they are written to");
  }
  const auto resolved = [](const std::optional<Tensor>& tensor) {
    return is_there(tensor) ? std::make_optional(tensor->resolve_neg()) : std::nullopt;
  };
  return call_norm_forward(
      input.resolve_neg(),
      resolved(weight),
      resolved(bias),
      running_mean,
      running_var,
      resolved(residual),
      resolved(statistics),
      training,
      momentum,
      eps,
      activation,
      alpha,
      beta,
      pool,
      keep);
}

NormGradients norm_backward_meta(
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
  const NormSizes sizes = check_norm_backward(grad_output, input, weight, kept, live, bias, residual, activation, pool);
  return allocate_norm_gradients(input, sizes, input_wanted, affine_wanted, residual_wanted);
}

namespace {

// The settings of a node.
struct NormOptions {
  bool training;
  double eps;
  cpu::norm_act::Activation activation;
  Pool pool;

  bool relu() const {
    return activation.kind == cpu::norm_act::Kind::Relu;
  }
};

// The node's inputs, of which those that are not given are undefined.
enum NodeInput : size_t { kInput, kWeight, kBias, kResidual };

using Gradients = std::array<Tensor, 4>;

// Returns 1 where the value behind a ReLU is live and 0 elsewhere, of the shape and dtype of the input.
Tensor live_bits(const Tensor& input, const Tensor& live) {
  const int64_t channels = input.size(1);
  const Tensor shifts = arange(8, live.options());
  const Tensor bits = live.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(1).narrow(1, 0, channels);
  const Tensor of_images = input.dim() == 4
      ? bits.view({input.size(0), input.size(2), input.size(3), channels}).permute({0, 3, 1, 2})
      : bits;
  return of_images.to(input.scalar_type());
}

// Returns the gradient of the normalized input, in differentiable ops: that of the output where it is live.
Tensor live_gradient(const Tensor& grad_output, const Tensor& input, const Tensor& live, const NormOptions& options) {
  if (options.pool != Pool::Max) {
    const Tensor of_values = options.pool == Pool::Mean
        ? (grad_output / static_cast<double>(input.size(2) * input.size(3))).expand(input.sizes())
        : grad_output;
    return options.relu() ? of_values * live_bits(input, live) : of_values;
  }
  const int64_t images = input.size(0);
  const int64_t channels = input.size(1);
  const int64_t rows = input.size(2) / 2;
  const int64_t columns = input.size(3) / 2;
  const Tensor argmax = live.view({images, rows, columns, channels, 1}).permute({0, 3, 1, 2, 4});
  const Tensor selected = argmax.eq(arange(4, live.options())).to(input.scalar_type());
  // [..., rows, columns, 2, 2] -> [..., 2 rows, 2 columns].
  const Tensor gradient = (grad_output.unsqueeze(-1) * selected)
                              .reshape({images, channels, rows, columns, 2, 2})
                              .permute({0, 1, 2, 4, 3, 5})
                              .reshape({images, channels, 2 * rows, 2 * columns});
  return pad_with_zeros(gradient, {0, input.size(3) % 2, 0, input.size(2) % 2});
}

// Returns the normalized input in differentiable ops.
Tensor normalized(const Tensor& input, const Tensor& weight, const Tensor& kept, const NormOptions& options) {
  const std::vector<int64_t> rows = input.dim() == 4 ? std::vector<int64_t>{0, 2, 3} : std::vector<int64_t>{0};
  const auto of_channels = [&](const Tensor& tensor) { return input.dim() == 4 ? tensor.view({-1, 1, 1}) : tensor; };
  Tensor result;
  if (options.training) {
    const Tensor centered = input - input.mean(rows, /*keepdim=*/true);
    result = centered * centered.square().mean(rows, /*keepdim=*/true).add(options.eps).rsqrt();
  } else {
    result = (input - of_channels(kept.select(0, 0))) * of_channels(kept.select(0, 1));
  }
  return weight.defined() ? result * of_channels(weight) : result;
}

// Returns the output of a general activation function, in differentiable ops.
Tensor activated(const Tensor& x, const cpu::norm_act::Activation& activation) {
  using cpu::norm_act::Kind;
  const double alpha = activation.alpha, beta = activation.beta;
  switch (activation.kind) {
    case Kind::None:
      return x;
    case Kind::Relu:
      return x.relu();
    case Kind::LeakyRelu:
      return leaky_relu(x, alpha);
    case Kind::Hardtanh:
      return x.clamp(alpha, beta);
    case Kind::Elu:
      return elu(x, alpha);
    case Kind::Silu:
      return x * x.sigmoid();
    case Kind::Gelu:
      return gelu(x, "none");
    case Kind::GeluTanh:
      return gelu(x, "tanh");
    case Kind::Hardswish:
      return x * x.add(3).clamp(0, 6).div(6);
    case Kind::Hardsigmoid:
      return x.add(3).clamp(0, 6).div(6);
    case Kind::Tanh:
      return x.tanh();
    case Kind::Sigmoid:
      return x.sigmoid();
    case Kind::Softplus:
      return softplus(x, alpha, beta);
  }
  return x;
}

// Returns gradients of a call with a general activation function that are differentiable.
Gradients general_gradients(
    const Tensor& grad_output,
    const std::array<Tensor, 4>& inputs,
    const Tensor& kept,
    const NormOptions& options,
    const std::array<bool, 4>& wanted) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  // Aliases cut the graph between these tensors, if one was computed from another.
  std::array<Tensor, 4> aliases;
  for (const NodeInput which : {kInput, kWeight, kBias, kResidual}) {
    aliases[which] = inputs[which].defined() ? inputs[which].alias() : inputs[which];
  }
  const Tensor& input = aliases[kInput];
  Tensor x = normalized(input, aliases[kWeight], kept, options);
  if (aliases[kBias].defined()) {
    x = x + (input.dim() == 4 ? aliases[kBias].view({-1, 1, 1}) : aliases[kBias]);
  }
  x = activated(aliases[kResidual].defined() ? x + aliases[kResidual] : x, options.activation);
  std::vector<Tensor> chosen;
  for (const NodeInput which : {kInput, kWeight, kBias, kResidual}) {
    if (wanted[which]) {
      chosen.push_back(aliases[which]);
    }
  }
  Gradients gradients;
  const Tensor output = options.pool == Pool::Max ? max_pool2d(x, 2)
      : options.pool == Pool::Mean                ? x.mean({2, 3}, /*keepdim=*/true)
                                                  : x;
  const auto found = differentiate(output, chosen, grad_output, create_graph);
  size_t next = 0;
  for (const NodeInput which : {kInput, kWeight, kBias, kResidual}) {
    if (wanted[which]) {
      gradients[which] = found[next++];
    }
  }
  return gradients;
}

// Returns gradients that are differentiable, for backward with create_graph=True, and that take a batch of upstream
// gradients. Which outputs are live is constant almost everywhere.
Gradients reference_gradients(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& weight,
    const Tensor& kept,
    const Tensor& live,
    const NormOptions& options,
    const std::array<bool, 4>& wanted) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  const Tensor g = live_gradient(grad_output, input, live, options);
  Gradients gradients;
  if (wanted[kResidual]) {
    gradients[kResidual] = g;
  }
  if (wanted[kBias]) {
    gradients[kBias] = input.dim() == 4 ? g.sum({0, 2, 3}) : g.sum({0});
  }
  // Aliases cut the graph between these tensors, if one was computed from another.
  const std::array<Tensor, 2> aliases{input.alias(), weight.defined() ? weight.alias() : weight};
  std::vector<Tensor> inputs;
  for (const NodeInput which : {kInput, kWeight}) {
    if (wanted[which]) {
      inputs.push_back(aliases[which]);
    }
  }
  if (!inputs.empty()) {
    const auto found = differentiate(normalized(aliases[0], aliases[1], kept, options), inputs, g, create_graph);
    size_t next = 0;
    for (const NodeInput which : {kInput, kWeight}) {
      if (wanted[which]) {
        gradients[which] = found[next++];
      }
    }
  }
  return gradients;
}

// The node saves the input, the weight, mean and inverse standard deviation, and which outputs are live. A general
// activation function needs the values before it: then it also saves bias and residual, from which they are computed.
class NormActBackward : public Backward {
 public:
  explicit NormActBackward(const NormOptions& options) : options_(options) {}

  const char* name() const override {
    return "NormActBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_output) override {
    if (!grad_output.defined()) {
      return std::vector<Tensor>(4);
    }
    std::array<bool, 4> wanted;
    for (const NodeInput which : {kInput, kWeight, kBias, kResidual}) {
      wanted[which] = is_wanted(which);
    }
    const Tensor input = saved(0), weight = saved(1), kept = saved(2), live = saved(3);
    const bool general = options_.activation.is_general();
    const Tensor bias = general ? saved(4) : Tensor(), residual = general ? saved(5) : Tensor();
    if (at::GradMode::is_enabled() || is_batched(grad_output)) {
      if (general) {
        const auto found = general_gradients(grad_output, {input, weight, bias, residual}, kept, options_, wanted);
        return {found.begin(), found.end()};
      }
      const auto found = reference_gradients(grad_output, input, weight, kept, live, options_, wanted);
      return {found.begin(), found.end()};
    }
    // Without a function and a pool the gradient of the residual is that of the output.
    const bool same = options_.activation.kind == cpu::norm_act::Kind::None && options_.pool == Pool::None;
    const bool affine = wanted[kWeight] || wanted[kBias];
    std::vector<Tensor> gradients(4);
    if (wanted[kInput] || affine || (wanted[kResidual] && !same)) {
      std::tie(gradients[kInput], gradients[kWeight], gradients[kBias], gradients[kResidual]) = call_norm_backward(
          grad_output,
          input,
          optional(weight),
          kept,
          live,
          optional(bias),
          optional(residual),
          options_.training,
          static_cast<int64_t>(options_.activation.kind),
          options_.activation.alpha,
          options_.activation.beta,
          static_cast<int64_t>(options_.pool),
          wanted[kInput],
          affine,
          wanted[kResidual] && !same);
    }
    for (const NodeInput which : {kInput, kWeight, kBias, kResidual}) {
      if (!wanted[which]) {
        gradients[which] = Tensor();
      }
    }
    if (wanted[kResidual] && same) {
      gradients[kResidual] = grad_output;
    }
    return gradients;
  }

 private:
  static std::optional<Tensor> optional(const Tensor& tensor) {
    return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
  }

  const NormOptions options_;
};

}  // namespace

Tensor norm_act_below_autograd(LIGHTKIT_NORM_PARAMETERS) {
  return std::get<0>(call_norm_forward(LIGHTKIT_NORM_ARGUMENTS, /*keep=*/false));
}

Tensor norm_act_autograd(LIGHTKIT_NORM_PARAMETERS) {
  const std::array<Tensor, 4> inputs{
      input, weight.value_or(Tensor()), bias.value_or(Tensor()), residual.value_or(Tensor())};
  const bool needs_gradient = at::GradMode::is_enabled() &&
      std::any_of(inputs.begin(), inputs.end(), [](const auto& t) { return t.defined() && t.requires_grad(); });
  Tensor output, kept, live;
  {
    // As in torch, an update of the running statistics is no change that autograd notices: torch's own node saves them.
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(output, kept, live) = call_norm_forward(LIGHTKIT_NORM_ARGUMENTS, /*keep=*/needs_gradient);
  }
  if (needs_gradient) {
    const NormOptions options{
        training, eps, {static_cast<cpu::norm_act::Kind>(activation), alpha, beta}, static_cast<Pool>(pool)};
    auto backward = std::make_unique<NormActBackward>(options);
    if (options.activation.is_general()) {
      record(
          output, std::move(backward), inputs, {input, inputs[kWeight], kept, live, inputs[kBias], inputs[kResidual]});
    } else {
      record(output, std::move(backward), inputs, {input, inputs[kWeight], kept, live});
    }
  }
  return output;
}

}  // namespace lightkit
