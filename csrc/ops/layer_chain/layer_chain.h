// The ops on chains of layers, and the types that their files share.
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

// The settings of the layers as in the schemas: four numbers a layer, which are the padding of rows, the padding of
// columns, relu (0 or 1) and pool (0 or 1); and the scale of each layer's quantised output, or 0. An empty list of
// scales quantises nothing.
struct Settings {
  at::IntArrayRef numbers;
  at::ArrayRef<double> scales = {};

  at::IntArrayRef padding(size_t layer) const {
    return numbers.slice(4 * layer, 2);
  }
  bool relu(size_t layer) const {
    return numbers[4 * layer + 2] != 0;
  }
  bool pool(size_t layer) const {
    return numbers[4 * layer + 3] != 0;
  }
  double scale(size_t layer) const {
    return scales.empty() ? 0 : scales[layer];
  }
};

// Names the op and the layer in error messages.
struct Where {
  const char* op;
  int64_t layer = -1;
};

inline std::ostream& operator<<(std::ostream& stream, const Where& where) {
  stream << where.op;
  return where.layer < 0 ? stream : stream << ": layer " << where.layer;
}

// The sizes of a layer, which may be symbols.
struct LayerSizes {
  c10::SymInt channels, height, width;  // of the unpadded input
  c10::SymInt out_channels, kernel_height, kernel_width;
  c10::SymInt rows, columns;  // of the output
  bool linear;
};

// These functions raise for arguments that do not fit; the messages name the op and the layer. They compare sizes that
// are no symbols with the kernels' limits, on any device, so that no product of sizes overflows 64 bits.
void check_input(const char* op, const at::Tensor& input);

// `before` holds channels, height and width of the input; the call replaces them by those of the output.
LayerSizes check_layer(
    const Where& where,
    const at::Tensor& input,
    std::array<c10::SymInt, 3>& before,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef padding,
    bool pool);

std::vector<LayerSizes> check_chain(
    const at::Tensor& input, at::TensorList weights, OptionalTensors biases, const Settings& settings);

// Checks the arguments of backward, too: the gradient, and the tensors that forward kept.
std::vector<LayerSizes> check_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    at::TensorList weights,
    const at::Tensor& activations,
    const at::Tensor& argmax,
    const Settings& settings,
    at::IntArrayRef wanted);

// Returns channels, height and width of an image.
std::array<c10::SymInt, 3> image_sizes(const at::Tensor& input);

// Returns the sizes of the output.
std::vector<c10::SymInt> output_sizes(const at::Tensor& input, const LayerSizes& last);

// Returns the elements of the padded inputs of all layers but the first, and of the outputs of all layers.
std::pair<c10::SymInt, c10::SymInt> kept_sizes(
    const at::Tensor& input, const std::vector<LayerSizes>& sizes, const Settings& settings);

// Returns the dtype that the kernels compute in.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Output, activations and argmax.
using ChainResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The ops, as in cross_entropy.h.

// lightkit::layer_chain.
using LayerChainOp = at::Tensor(
    const at::Tensor& input,
    at::TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef settings,
    at::ArrayRef<double> scales);
LayerChainOp layer_chain_below_autograd, layer_chain_autograd, call_layer_chain;

// lightkit::_layer_chain_forward.
using ChainForwardOp = ChainResults(
    const at::Tensor& input,
    at::TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef settings,
    bool keep,
    at::ArrayRef<double> scales);
ChainForwardOp chain_forward_meta, chain_forward_cpu, call_chain_forward;

// lightkit::_layer_chain_backward.
using ChainBackwardOp = std::vector<at::Tensor>(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    at::TensorList weights,
    const at::Tensor& activations,
    const at::Tensor& argmax,
    at::IntArrayRef settings,
    at::IntArrayRef wanted);
ChainBackwardOp chain_backward_meta, chain_backward_cpu, call_chain_backward;

// lightkit::conv_relu_pool, a chain of one layer.
using ConvReluPoolOp = at::Tensor(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef padding,
    bool pool);
ConvReluPoolOp conv_relu_pool;

// Allocates the results; activations and argmax are [0] unless `keep`.
ChainResults allocate_results(
    const at::Tensor& input, const std::vector<LayerSizes>& sizes, const Settings& settings, bool keep);

// Allocates the gradients of the input, the weights and the biases that are `wanted`; the others are [0].
std::vector<at::Tensor> allocate_gradients(const at::Tensor& input, at::TensorList weights, at::IntArrayRef wanted);

}  // namespace lightkit
