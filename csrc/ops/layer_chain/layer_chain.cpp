// lightkit::layer_chain, and lightkit::conv_relu_pool, a chain of one layer: the Meta kernels and autograd.
//
// A layer is a convolution or, with a weight of two dimensions, a linear layer, which is a convolution whose kernel is
// as large as its input. The forward pass keeps a convolution's output after the pool, and the argmax of each value in
// a byte.

#include "layer_chain.h"

#include "../../kernels/cpu/layer_chain/quantize.h"
#include "../common/autograd_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>

namespace lightkit {

using at::Tensor;
using at::TensorList;

ChainResults chain_forward_meta(
    const Tensor& input,
    TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef numbers,
    bool keep,
    at::ArrayRef<double> scales) {
  const Settings settings{numbers, scales};
  return allocate_results(input, check_chain(input, weights, biases, settings), settings, keep);
}

std::vector<Tensor> chain_backward_meta(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    const Tensor& activations,
    const Tensor& argmax,
    at::IntArrayRef numbers,
    at::IntArrayRef wanted) {
  check_backward(grad_output, input, weights, activations, argmax, {numbers}, wanted);
  return allocate_gradients(input, weights, wanted);
}

namespace {

// Returns the output of the chain in differentiable ops.
Tensor reference(const Tensor& input, TensorList weights, TensorList biases, const Settings& settings) {
  Tensor x = input;
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::optional<Tensor> bias = biases[l].defined() ? std::make_optional(biases[l]) : std::nullopt;
    x = weights[l].dim() == 2 ? linear(x.flatten(1), weights[l], bias)
                              : conv2d(x, weights[l], bias, settings.padding(l));
    x = settings.relu(l) ? x.relu() : x;
    x = settings.pool(l) ? max_pool2d(x, 2) : x;
    const double scale = settings.scale(l);
    x = scale > 0 ? fake_quantize(x, scale, cpu::layer_chain::kMaxLevel) : x;
  }
  return x;
}

// Returns the gradients of the reference: they are differentiable, for backward with create_graph=True, and take a
// batch of upstream gradients. The argmax is constant almost everywhere.
std::vector<Tensor> reference_gradients(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    TensorList biases,
    const Settings& settings,
    at::IntArrayRef wanted) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  // Aliases cut the graph between these tensors, if one was computed from another.
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

// The node's inputs are the input, the weights, and the biases that are given. It saves them, and then activations and
// argmax.
class LayerChainBackward : public Backward {
 public:
  LayerChainBackward(OptionalTensors biases, const Settings& settings)
      : numbers_(settings.numbers.vec()), scales_(settings.scales.vec()) {
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
    // inputs[i] is the node's input that gradient i of the op belongs to.
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
        ? reference_gradients(grad_output, input, weights, biases, {numbers_, scales_}, wanted)
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
  const std::vector<double> scales_;
  std::vector<bool> has_bias_;
};

bool needs_gradient(TensorList inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const Tensor& tensor) { return tensor.requires_grad(); });
}

}  // namespace

Tensor layer_chain_below_autograd(
    const Tensor& input,
    TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef numbers,
    at::ArrayRef<double> scales) {
  return std::get<0>(call_chain_forward(input, weights, biases, numbers, /*keep=*/false, scales));
}

Tensor layer_chain_autograd(
    const Tensor& input,
    TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef numbers,
    at::ArrayRef<double> scales) {
  std::vector<Tensor> inputs{input};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  for (const auto& bias : biases) {
    if (is_there(bias)) {
      inputs.push_back(*bias);
    }
  }
  if (!at::GradMode::is_enabled() || !needs_gradient(inputs)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_chain_below_autograd(input, weights, biases, numbers, scales);
  }
  Tensor output, activations, argmax;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(output, activations, argmax) = call_chain_forward(input, weights, biases, numbers, /*keep=*/true, scales);
  }
  std::vector<Tensor> saved = inputs;
  saved.insert(saved.end(), {activations, argmax});
  record(output, std::make_unique<LayerChainBackward>(biases, Settings{numbers, scales}), inputs, saved);
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
  return call_layer_chain(input, weight, {bias}, {padding[0], padding[1], /*relu=*/1, pool}, {});
}

}  // namespace lightkit
