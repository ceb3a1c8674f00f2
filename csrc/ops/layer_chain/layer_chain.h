// The ops on chains of layers, and what their parts share.
#pragma once

#include "../common/checks.h"
#include "../common/tensors.h"

#include <array>
#include <optional>
#include <ostream>
#include <tuple>
#include <utility>
#include <vector>

namespace lightkit {

using OptionalTensors = at::ArrayRef<std::optional<at::Tensor>>;

inline constexpr auto kChainLayout = at::MemoryFormat::ChannelsLast;

// What the layers do, as the schemas have it, in four numbers a layer: the padding of rows and columns, whether a ReLU
// and whether a pool follows.
struct Settings {
  at::IntArrayRef numbers;

  at::IntArrayRef padding(size_t layer) const {
    return numbers.slice(4 * layer, 2);
  }
  bool relu(size_t layer) const {
    return numbers[4 * layer + 2] != 0;
  }
  bool pool(size_t layer) const {
    return numbers[4 * layer + 3] != 0;
  }
};

// Whom an error is about.
struct Where {
  const char* op;
  int64_t layer = -1;
};

inline std::ostream& operator<<(std::ostream& stream, const Where& where) {
  stream << where.op;
  return where.layer < 0 ? stream : stream << ": layer " << where.layer;
}

// A layer's sizes, which may be symbols: of its input without padding, its kernel, and its output.
struct LayerSizes {
  c10::SymInt channels, height, width;
  c10::SymInt out_channels, kernel_height, kernel_width;
  c10::SymInt rows, columns;
  bool linear;
};

// Raise for what does not fit, in words that name the op and the layer. Sizes that are no symbols are compared with what
// the kernels take, on any device: no product of them is beyond 64 bits afterwards.
void check_input(const char* op, const at::Tensor& input);

// `before` holds channels, height and width of what comes in, and gets those of what goes out.
LayerSizes check_layer(
    const Where& where,
    const at::Tensor& input,
    std::array<c10::SymInt, 3>& before,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef padding,
    bool pool);

std::vector<LayerSizes> check_chain(
    const at::Tensor& input,
    at::TensorList weights,
    OptionalTensors biases,
    const Settings& settings);

// The same for backward, and that what forward has kept belongs to them.
std::vector<LayerSizes> check_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    at::TensorList weights,
    const at::Tensor& activations,
    const at::Tensor& index,
    const Settings& settings,
    at::IntArrayRef wanted);

// Channels, height and width of an image.
std::array<c10::SymInt, 3> image_sizes(const at::Tensor& input);

std::vector<c10::SymInt> output_sizes(const at::Tensor& input, const LayerSizes& last);

// Of the padded inputs of all layers but the first, and of the outputs of all.
std::pair<c10::SymInt, c10::SymInt> kept_sizes(
    const at::Tensor& input, const std::vector<LayerSizes>& sizes, const Settings& settings);

// What the kernels compute in.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// The output, and for backward the activations and the index.
using ChainResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The ops, as in cross_entropy.h.

// lightkit::layer_chain.
using LayerChainOp =
    at::Tensor(const at::Tensor& input, at::TensorList weights, OptionalTensors biases, at::IntArrayRef settings);
LayerChainOp layer_chain_below_autograd, layer_chain_autograd, call_layer_chain;

// lightkit::_layer_chain_forward.
using ChainForwardOp = ChainResults(
    const at::Tensor& input, at::TensorList weights, OptionalTensors biases, at::IntArrayRef settings, bool keep);
ChainForwardOp chain_forward_meta, chain_forward_cpu, call_chain_forward;

// lightkit::_layer_chain_backward.
using ChainBackwardOp = std::vector<at::Tensor>(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    at::TensorList weights,
    const at::Tensor& activations,
    const at::Tensor& index,
    at::IntArrayRef settings,
    at::IntArrayRef wanted);
ChainBackwardOp chain_backward_meta, chain_backward_cpu, call_chain_backward;

// lightkit::conv_relu_pool, which is a chain of one.
using ConvReluPoolOp = at::Tensor(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef padding,
    bool pool);
ConvReluPoolOp conv_relu_pool;

// Without values; the last two are (0) unless `keep`.
ChainResults allocate_results(
    const at::Tensor& input, const std::vector<LayerSizes>& sizes, const Settings& settings, bool keep);

// Of the input, the weights and the biases, without values: those that `wanted` names, (0) for the others.
std::vector<at::Tensor> allocate_gradients(const at::Tensor& input, at::TensorList weights, at::IntArrayRef wanted);

}  // namespace lightkit
