// lightkit::layer_chain, and conv_relu_pool, which is a chain of one: schemas, shapes for tracing, and autograd.
//
// A layer is a convolution or, with a weight of two dimensions, a linear layer: a convolution whose kernel is as large
// as its input. The forward pass keeps of a convolution's output only what a pool lets through, and a byte for each
// value that says where it came from.

#include "layer_chain.h"

#include "autograd_node.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

namespace lightkit {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ChainResults forward_meta(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers,
    bool keep) {
  const Settings settings{numbers};
  const std::vector<std::optional<Tensor>> all_biases(biases.begin(), biases.end());
  return allocate_results(input, check_chain(input, weights, all_biases, settings), settings, keep);
}

std::vector<Tensor> backward_meta(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    const Tensor& activations,
    const Tensor& index,
    at::IntArrayRef numbers,
    at::IntArrayRef wanted) {
  check_backward(grad_output, input, weights, activations, index, {numbers}, wanted);
  return allocate_gradients(input, weights, wanted);
}

ChainResults call_forward(
    const Tensor& input, TensorList weights, const OptionalTensors& biases, const Settings& settings, bool keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_layer_chain_forward", "")
                             .typed<decltype(forward_meta)>();
  return op.call(input, weights, biases, settings.numbers, keep);
}

// The same in differentiable operations.
Tensor reference(const Tensor& input, TensorList weights, TensorList biases, const Settings& settings) {
  Tensor x = input;
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::optional<Tensor> bias = biases[l].defined() ? std::make_optional(biases[l]) : std::nullopt;
    x = weights[l].dim() == 2 ? at::linear(x.flatten(1), weights[l], bias)
                              : at::conv2d(x, weights[l], bias, 1, settings.padding(l));
    x = settings.relu(l) ? at::relu(x) : x;
    x = settings.pool(l) ? at::max_pool2d(x, 2) : x;
  }
  return x;
}

// The gradients of the reference: differentiable for backward with create_graph=True, and for several upstream
// gradients at once. Which positions win does not change with the input, nearly everywhere.
std::vector<Tensor> reference_gradients(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    TensorList biases,
    const Settings& settings,
    at::IntArrayRef wanted) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  // Aliases: if one of the tensors was made from another, that is none of this operation's.
  const auto alias = [](const Tensor& tensor) { return tensor.defined() ? tensor.alias() : tensor; };
  variable_list all{alias(input)};
  for (const auto tensors : {weights, biases}) {
    for (const Tensor& tensor : tensors) {
      all.push_back(alias(tensor));
    }
  }
  const TensorList aliases(all);
  const Tensor output = reference(
      aliases[0], aliases.slice(1, weights.size()), aliases.slice(1 + weights.size(), weights.size()), settings);
  variable_list inputs;
  for (size_t i = 0; i < all.size(); ++i) {
    if (wanted[i]) {
      inputs.push_back(all[i]);
    }
  }
  const auto found = torch::autograd::grad({output}, inputs, {grad_output}, std::nullopt, create_graph);
  std::vector<Tensor> gradients(all.size());
  for (size_t i = 0, j = 0; i < all.size(); ++i) {
    if (wanted[i]) {
      gradients[i] = found[j++];
    }
  }
  return gradients;
}

// Its variables, and what backward keeps of them, are the input, the weights and those biases that there are.
class LayerChain : public torch::autograd::Function<LayerChain> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& input,
      TensorList weights,
      TensorList present_biases,
      const OptionalTensors& biases,
      std::vector<int64_t> numbers) {
    Tensor output, activations, index;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(output, activations, index) = call_forward(input, weights, biases, {numbers}, /*keep=*/true);
    }
    variable_list saved{input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), present_biases.begin(), present_biases.end());
    saved.insert(saved.end(), {activations, index});
    ctx->save_for_backward(std::move(saved));
    std::vector<bool> is_present;
    for (const std::optional<Tensor>& bias : biases) {
      is_present.push_back(is_there(bias));
    }
    ctx->saved_data["biases"] = std::move(is_present);
    ctx->saved_data["settings"] = std::move(numbers);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    // And none for the biases as they were given and the settings.
    variable_list gradients(saved.size() - 2 + 2);
    if (!grad_outputs[0].defined()) {
      return gradients;
    }
    const auto numbers = ctx->saved_data["settings"].toIntVector();
    const auto is_present = ctx->saved_data["biases"].toBoolList();
    const size_t count = is_present.size();
    const TensorList weights = TensorList(saved).slice(1, count);
    variable_list biases(count);
    // Of each gradient as the operations have them, the variable that it is for: the input comes without wanting one.
    std::vector<size_t> variables(1 + 2 * count, 0);
    c10::SmallVector<int64_t, 16> wanted(1 + 2 * count, 0);
    size_t next = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (i <= count || is_present[i - 1 - count]) {
        variables[i] = next++;
        wanted[i] = ctx->needs_input_grad(variables[i]);
        if (i > count) {
          biases[i - 1 - count] = saved[variables[i]];
        }
      }
    }
    const auto found = at::GradMode::is_enabled() || is_batched(grad_outputs[0])
        ? reference_gradients(grad_outputs[0], saved[0], weights, biases, {numbers}, wanted)
        : call_backward(grad_outputs[0], saved, weights, {numbers}, wanted);
    for (size_t i = 0; i < found.size(); ++i) {
      if (wanted[i]) {
        gradients[variables[i]] = found[i];
      }
    }
    return gradients;
  }

 private:
  static std::vector<Tensor> call_backward(
      const Tensor& grad_output,
      const variable_list& saved,
      TensorList weights,
      const Settings& settings,
      at::IntArrayRef wanted) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("lightkit::_layer_chain_backward", "")
                               .typed<decltype(backward_meta)>();
    return op.call(
        grad_output,
        saved[0],
        weights,
        saved[saved.size() - 2],
        saved[saved.size() - 1],
        settings.numbers,
        wanted);
  }
};

Tensor layer_chain(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers) {
  return std::get<0>(call_forward(input, weights, biases, {numbers}, /*keep=*/false));
}

bool needs_gradient(const Tensor& input, TensorList weights, TensorList biases) {
  const auto needs = [](const Tensor& tensor) { return tensor.requires_grad(); };
  return needs(input) || std::any_of(weights.begin(), weights.end(), needs) ||
      std::any_of(biases.begin(), biases.end(), needs);
}

Tensor layer_chain_autograd(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers) {
  variable_list present_biases;
  for (const std::optional<Tensor>& bias : biases) {
    if (is_there(bias)) {
      present_biases.push_back(*bias);
    }
  }
  if (at::GradMode::is_enabled() && needs_gradient(input, weights, present_biases)) {
    return LayerChain::apply(input, weights, TensorList(present_biases), biases, numbers.vec());
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return layer_chain(input, weights, biases, numbers);
}

Tensor conv_relu_pool(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef padding, bool pool) {
  constexpr auto op = "conv_relu_pool";
  check_input(op, input);
  TORCH_CHECK_VALUE(
      input.dim() == 4 && weight.dim() == 4,
      op,
      ": input and weight must have 4 dimensions, got ",
      input.sym_sizes(),
      " and ",
      weight.sym_sizes());
  auto before = image_sizes(input);
  check_layer({op}, input, before, weight, bias, padding, pool);
  static const auto chain = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("lightkit::layer_chain", "")
                                .typed<decltype(layer_chain)>();
  return chain.call(input, weight, OptionalTensors({bias}), {padding[0], padding[1], /*relu=*/1, pool});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
  m.def("layer_chain(Tensor input, Tensor[] weights, Tensor?[] biases, int[] settings) -> Tensor");
  m.def(
      "_layer_chain_forward(Tensor input, Tensor[] weights, Tensor?[] biases, int[] settings, bool keep) "
      "-> (Tensor output, Tensor activations, Tensor index)");
  m.def(
      "_layer_chain_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor activations, Tensor index, "
      "int[] settings, int[] wanted) -> Tensor[]");
  m.def("conv_relu_pool(Tensor input, Tensor weight, Tensor? bias, int[2] padding, bool pool) -> Tensor");
}

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_layer_chain_forward", forward_meta);
  m.impl("_layer_chain_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("layer_chain", layer_chain);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("layer_chain", layer_chain_autograd);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeImplicitAutograd, m) {
  m.impl("conv_relu_pool", conv_relu_pool);
}

}  // namespace lightkit
