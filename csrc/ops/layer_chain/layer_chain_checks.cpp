// Checks of the arguments of a chain, and sizes of its results, also for symbolic sizes.

#include "layer_chain.h"

#include <algorithm>
#include <cmath>

namespace lightkit {

using at::Tensor;
using at::TensorList;
using c10::SymInt;

namespace {

// The most values of an image and of a weight, whose rows are filled up to vectors. Derived: offsets in them have 32
// bits.
constexpr int64_t kMaxImage = int64_t(1) << 30;
constexpr int64_t kMaxWeight = int64_t(1) << 26;

// The most values of all images that a chain keeps. Derived: their bytes are counted in 64 bits.
constexpr double kMaxKept = 0x1p60;

void check_image(const Where& where, const SymInt& channels, const SymInt& height, const SymInt& width) {
  TORCH_CHECK_VALUE(
      product({channels, height, width}) < kMaxImage,
      where,
      ": images of less than 2^30 values are supported, got ",
      channels,
      "x",
      height,
      "x",
      width);
}

void check_flags(const Where& where, const char* name, at::IntArrayRef flags) {
  const auto is_flag = [](int64_t flag) { return flag == 0 || flag == 1; };
  TORCH_CHECK_VALUE(
      std::all_of(flags.begin(), flags.end(), is_flag), where, ": ", name, " must be 0 or 1, got ", flags);
}

void check_scale(const Where& where, double scale, bool relu) {
  const auto rounded = static_cast<float>(scale);
  TORCH_CHECK_VALUE(
      scale == 0 || (std::isnormal(rounded) && rounded > 0 && std::isnormal(1 / rounded)),
      where,
      ": a scale must be 0, or positive and finite with a finite inverse, got ",
      scale);
  TORCH_CHECK_VALUE(scale == 0 || relu, where, ": a layer without a ReLU has no scale, got ", scale);
}

}  // namespace

LayerSizes check_layer(
    const Where& where,
    const Tensor& input,
    std::array<SymInt, 3>& before,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef padding,
    bool pool) {
  check_same_kind(where, "the weight", weight, input);
  TORCH_CHECK_VALUE(
      weight.dim() == 4 || weight.dim() == 2,
      where,
      ": the weight must have 4 dimensions, or 2 of a linear layer, got ",
      weight.sym_sizes());
  TORCH_CHECK_VALUE(weight.sym_numel() > 0, where, ": the weight must not be empty, got shape ", weight.sym_sizes());
  TORCH_CHECK_VALUE(
      weight.sym_numel().maybe_as_int().value_or(0) < kMaxWeight,
      where,
      ": weights of less than 2^26 values are supported, got shape ",
      weight.sym_sizes());
  TORCH_CHECK_VALUE(
      padding.size() == 2 && std::min(padding[0], padding[1]) >= 0 &&
          std::max(padding[0], padding[1]) < int64_t(1) << 30,
      where,
      ": padding must be two numbers from 0 up and less than 2^30, got ",
      padding);
  const bool linear = weight.dim() == 2;
  const auto& [channels, height, width] = before;
  if (linear) {
    TORCH_CHECK_VALUE(
        weight.sym_size(1) == channels * height * width,
        where,
        ": the weight is for ",
        weight.sym_size(1),
        " values but the input has ",
        channels * height * width);
    TORCH_CHECK_VALUE(
        padding[0] == 0 && padding[1] == 0 && !pool, where, ": a linear layer has neither padding nor a pool");
  } else {
    TORCH_CHECK_VALUE(
        weight.sym_size(1) == channels,
        where,
        ": the weight is for ",
        weight.sym_size(1),
        " channels but the input has ",
        channels);
  }
  if (is_there(bias)) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
        where,
        ": the bias must hold one value for each of the ",
        weight.sym_size(0),
        " output channels, got shape ",
        bias->sym_sizes());
    check_same_kind(where, "the bias", *bias, input);
  }
  const SymInt kernel_height = linear ? height : weight.sym_size(2);
  const SymInt kernel_width = linear ? width : weight.sym_size(3);
  const SymInt rows = height + 2 * padding[0] - kernel_height + 1;
  const SymInt columns = width + 2 * padding[1] - kernel_width + 1;
  const int64_t least = pool ? 2 : 1;
  TORCH_CHECK_VALUE(
      rows >= least && columns >= least,
      where,
      ": an input of ",
      height,
      "x",
      width,
      " with padding ",
      padding,
      " is too small for a kernel of ",
      kernel_height,
      "x",
      kernel_width,
      pool ? " and a pool of 2x2" : "");
  LayerSizes sizes{
      channels,
      height,
      width,
      weight.sym_size(0),
      kernel_height,
      kernel_width,
      pool ? rows / 2 : rows,
      pool ? columns / 2 : columns,
      linear};
  check_image(where, sizes.channels, sizes.height + 2 * padding[0], sizes.width + 2 * padding[1]);
  check_image(where, sizes.out_channels, sizes.rows, sizes.columns);
  before = {sizes.out_channels, sizes.rows, sizes.columns};
  return sizes;
}

void check_input(const char* op, const Tensor& input) {
  TORCH_CHECK(
      at::isFloatingType(input.scalar_type()), op, ": the input must be floating point, got ", input.scalar_type());
  TORCH_CHECK_VALUE(
      input.dim() == 4 || input.dim() == 2,
      op,
      ": the input must have 4 dimensions, or 2 before a linear layer, got ",
      input.sym_sizes());
  const auto [channels, height, width] = image_sizes(input);
  check_image({op}, channels, height, width);
}

std::array<SymInt, 3> image_sizes(const Tensor& input) {
  if (input.dim() == 2) {
    return {input.sym_size(1), 1, 1};
  }
  return {input.sym_size(1), input.sym_size(2), input.sym_size(3)};
}

std::vector<LayerSizes> check_chain(
    const Tensor& input, TensorList weights, OptionalTensors biases, const Settings& settings) {
  constexpr auto op = "layer_chain";
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(
      count > 0 && biases.size() == count && settings.numbers.size() == 4 * count,
      op,
      ": each layer must have a weight, a bias or None, and four numbers of settings, got ",
      count,
      ", ",
      biases.size(),
      " and ",
      settings.numbers.size());
  TORCH_CHECK_VALUE(
      settings.scales.empty() || settings.scales.size() == count,
      op,
      ": scales must be empty or have a number for each of the ",
      count,
      " layers, got ",
      settings.scales.size());
  check_input(op, input);
  auto before = image_sizes(input);
  std::vector<LayerSizes> sizes;
  for (size_t l = 0; l < count; ++l) {
    TORCH_CHECK_VALUE(
        weights[l].dim() == 2 || (l == 0 ? input.dim() == 4 : !sizes.back().linear),
        Where{op, static_cast<int64_t>(l)},
        ": a convolution cannot follow a linear layer");
    const Where where{op, static_cast<int64_t>(l)};
    check_flags(where, "relu and pool", settings.numbers.slice(4 * l + 2, 2));
    check_scale(where, settings.scale(l), settings.relu(l));
    sizes.push_back(check_layer(where, input, before, weights[l], biases[l], settings.padding(l), settings.pool(l)));
  }
  double values = 0;
  for (size_t l = 0; l < count; ++l) {
    const auto& s = sizes[l];
    values += product({s.channels, s.height + 2 * settings.padding(l)[0], s.width + 2 * settings.padding(l)[1]});
    values += product({s.out_channels, s.rows, s.columns});
  }
  TORCH_CHECK_VALUE(
      values * product({input.sym_size(0)}) < kMaxKept,
      op,
      ": batches whose layers have less than 2^60 values are supported, got an input of shape ",
      input.sym_sizes());
  return sizes;
}

std::vector<LayerSizes> check_backward(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    const Tensor& activations,
    const Tensor& argmax,
    const Settings& settings,
    at::IntArrayRef wanted) {
  constexpr auto op = "layer_chain";
  const std::vector<std::optional<Tensor>> no_biases(weights.size());
  auto sizes = check_chain(input, weights, no_biases, settings);
  const auto [kept, outputs] = kept_sizes(input, sizes, settings);
  const auto output = output_sizes(input, sizes.back());
  check_same_kind(Where{op}, "the gradient", grad_output, input);
  const auto is_kept = [&](const Tensor& tensor, const SymInt& count, at::ScalarType type) {
    return tensor.sym_numel() == count && tensor.scalar_type() == type && tensor.device() == input.device();
  };
  TORCH_CHECK_VALUE(
      grad_output.sym_sizes() == output && is_kept(activations, kept, compute_type(input.scalar_type())) &&
          is_kept(argmax, outputs, at::kByte),
      op,
      ": the gradient must have the shape of the output, ",
      at::SymIntArrayRef(output),
      ", and activations and argmax be what forward returned, ",
      kept,
      " values of ",
      compute_type(input.scalar_type()),
      " and ",
      outputs,
      " of Byte, got ",
      grad_output.sym_sizes(),
      ", ",
      activations.sym_sizes(),
      " of ",
      activations.scalar_type(),
      " and ",
      argmax.sym_sizes(),
      " of ",
      argmax.scalar_type());
  TORCH_CHECK_VALUE(
      wanted.size() == 1 + 2 * weights.size(),
      op,
      ": `wanted` must have a flag for the input and two for each layer, got ",
      wanted.size());
  check_flags({op}, "`wanted`", wanted);
  return sizes;
}

std::vector<SymInt> output_sizes(const Tensor& input, const LayerSizes& last) {
  if (last.linear) {
    return {input.sym_size(0), last.out_channels};
  }
  return {input.sym_size(0), last.out_channels, last.rows, last.columns};
}

std::pair<SymInt, SymInt> kept_sizes(
    const Tensor& input, const std::vector<LayerSizes>& sizes, const Settings& settings) {
  SymInt activations = 0;
  SymInt outputs = 0;
  for (size_t l = 0; l < sizes.size(); ++l) {
    const auto& s = sizes[l];
    outputs += s.out_channels * s.rows * s.columns;
    if (l > 0) {
      const auto padding = settings.padding(l);
      activations += s.channels * (s.height + 2 * padding[0]) * (s.width + 2 * padding[1]);
    }
  }
  return {activations * input.sym_size(0), outputs * input.sym_size(0)};
}

ChainResults allocate_results(
    const Tensor& input, const std::vector<LayerSizes>& sizes, const Settings& settings, bool keep) {
  const auto output = output_sizes(input, sizes.back());
  const auto [activations, outputs] = kept_sizes(input, sizes, settings);
  const auto options = input.options();
  return {
      output.size() == 4 ? empty_symint(output, options, kChainLayout) : empty_symint(output, options),
      empty_symint({keep ? activations : SymInt(0)}, options.dtype(compute_type(input.scalar_type()))),
      empty_symint({keep ? outputs : SymInt(0)}, options.dtype(at::kByte))};
}

std::vector<Tensor> allocate_gradients(const Tensor& input, TensorList weights, at::IntArrayRef wanted) {
  const auto empty = [&](bool is_wanted, at::SymIntArrayRef sizes, bool image) {
    const std::vector<SymInt> none{0};
    return image && is_wanted ? empty_symint(sizes, input.options(), kChainLayout)
                              : empty_symint(is_wanted ? sizes : at::SymIntArrayRef(none), input.options());
  };
  std::vector<Tensor> gradients{empty(wanted[0], input.sym_sizes(), input.dim() == 4)};
  for (size_t l = 0; l < weights.size(); ++l) {
    gradients.push_back(empty(wanted[1 + l], weights[l].sym_sizes(), false));
  }
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::vector<SymInt> size{weights[l].sym_size(0)};
    gradients.push_back(empty(wanted[1 + weights.size() + l], size, false));
  }
  return gradients;
}

}  // namespace lightkit
