// lightkit::layer_chain, and conv_relu_pool, which is a chain of one: shapes for tracing, and autograd.
//
// A layer is a convolution or, with a weight of two dimensions, a linear layer: a convolution whose kernel is as large
// as its input. The forward pass keeps of a convolution's output only what a pool lets through, and a byte for each
// value that says where it came from.

#include "layer_chain.h"

#include "../common/autograd_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>

namespace lightkit {

using at::Tensor;
using at::TensorList;

ChainResults chain_forward_meta(
    const Tensor& input, TensorList weights, OptionalTensors biases, at::IntArrayRef numbers, bool keep) {
  const Settings settings{numbers};
  return allocate_results(input, check_chain(input, weights, biases, settings), settings, keep);
}

std::vector<Tensor> chain_backward_meta(
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

namespace {

// The same in differentiable operations.
Tensor reference(const Tensor& input, TensorList weights, TensorList biases, const Settings& settings) {
  Tensor x = input;
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::optional<Tensor> bias = biases[l].defined() ? std::make_optional(biases[l]) : std::nullopt;
    x = weights[l].dim() == 2 ? linear(x.flatten(1), weights[l], bias)
                              : conv2d(x, weights[l], bias, settings.padding(l));
    x = settings.relu(l) ? x.relu() : x;
    x = settings.pool(l) ? max_pool2d(x, 2) : x;
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
  std::vector<Tensor> all{alias(input)};
  for (const auto tensors : {weights, biases}) {
    for (const Tensor& tensor : tensors) {
      all.push_back(alias(tensor));
    }
  }
  const TensorList aliases(all);
  const Tensor output = reference(
      aliases[0], aliases.slice(1, weights.size()), aliases.slice(1 + weights.size(), weights.size()), settings);
  std::vector<Tensor> inputs;
  for (size_t i = 0; i < all.size(); ++i) {
    if (wanted[i]) {
      inputs.push_back(all[i]);
    }
  }
  const auto found = differentiate(output, inputs, grad_output, create_graph);
  std::vector<Tensor> gradients(all.size());
  for (size_t i = 0, j = 0; i < all.size(); ++i) {
    if (wanted[i]) {
      gradients[i] = found[j++];
    }
  }
  return gradients;
}

// Its inputs, the first of what it saves, are the input, the weights and those biases that there are; activations and
// index follow.
class LayerChainBackward : public Backward {
 public:
  LayerChainBackward(OptionalTensors biases, at::IntArrayRef numbers) : numbers_(numbers.vec()) {
    for (const auto& bias : biases) {
      has_bias_.push_back(is_there(bias));
    }
  }

  const char* name() const override {
    return "LayerChainBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_output) override {
    const size_t count = has_bias_.size();
    const Tensor input = saved(0);
    std::vector<Tensor> weights, biases(count);
    // Of each gradient as the operations have them, the input of this node that it is for.
    std::vector<size_t> inputs(1 + 2 * count, 0);
    std::vector<int64_t> wanted(1 + 2 * count, 0);
    size_t next = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (i <= count || has_bias_[i - 1 - count]) {
        inputs[i] = next++;
        wanted[i] = is_wanted(inputs[i]);
        if (i > count) {
          biases[i - 1 - count] = saved(inputs[i]);
        } else if (i > 0) {
          weights.push_back(saved(i));
        }
      }
    }
    std::vector<Tensor> gradients(next);
    if (!grad_output.defined()) {
      return gradients;
    }
    const auto found = at::GradMode::is_enabled() || is_batched(grad_output)
        ? reference_gradients(grad_output, input, weights, biases, {numbers_}, wanted)
        : call_chain_backward(grad_output, input, weights, saved(next), saved(next + 1), numbers_, wanted);
    for (size_t i = 0; i < found.size(); ++i) {
      if (wanted[i]) {
        gradients[inputs[i]] = found[i];
      }
    }
    return gradients;
  }

 private:
  const std::vector<int64_t> numbers_;
  std::vector<bool> has_bias_;
};

bool needs_gradient(TensorList inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const Tensor& tensor) { return tensor.requires_grad(); });
}

}  // namespace

Tensor layer_chain_below_autograd(
    const Tensor& input, TensorList weights, OptionalTensors biases, at::IntArrayRef numbers) {
  return std::get<0>(call_chain_forward(input, weights, biases, numbers, /*keep=*/false));
}

Tensor layer_chain_autograd(const Tensor& input, TensorList weights, OptionalTensors biases, at::IntArrayRef numbers) {
  std::vector<Tensor> inputs{input};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  for (const auto& bias : biases) {
    if (is_there(bias)) {
      inputs.push_back(*bias);
    }
  }
  if (!at::GradMode::is_enabled() || !needs_gradient(inputs)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_chain_below_autograd(input, weights, biases, numbers);
  }
  Tensor output, activations, index;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(output, activations, index) = call_chain_forward(input, weights, biases, numbers, /*keep=*/true);
  }
  std::vector<Tensor> saved = inputs;
  saved.insert(saved.end(), {activations, index});
  record(output, std::make_unique<LayerChainBackward>(biases, numbers), inputs, saved);
  return output;
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
  return call_layer_chain(input, weight, {bias}, {padding[0], padding[1], /*relu=*/1, pool});
}

}  // namespace lightkit
