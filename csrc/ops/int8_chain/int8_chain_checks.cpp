// Checks of the arguments of a chain of 8-bit layers, and the sizes of its layers, also for symbolic sizes.

#include "int8_chain.h"

#include <algorithm>
#include <array>

namespace lightkit {

using at::Tensor;
using c10::SymInt;

namespace {

// The most values of all activations of an image, and of a weight. Derived: offsets in them, and counts of
// multiply-adds, have room in 64 bits.
constexpr double kMaxImage = 0x1p30;
constexpr double kMaxWeight = 0x1p26;

// The most bytes of a layer's packed parameters, in which a group has whole vectors of output channels. Chosen:
// ordinary layers have fewer, and a plan cannot ask for all memory.
constexpr int64_t kMaxPacked = int64_t(1) << 31;

// The largest size, step or padding. Derived: sums and products of two of them have room in 64 bits.
constexpr int64_t kMaxNumber = int64_t(1) << 30;

// The most values of a batch. Derived: their bytes are counted in 64 bits.
constexpr double kMaxBatch = 0x1p60;

// Names the op and the layer in error messages.
struct Place {
  const char* op;
  size_t layer;
};

std::ostream& operator<<(std::ostream& stream, const Place& place) {
  return stream << place.op << ": layer " << place.layer;
}

void check_between(const Place& place, const char* name, int64_t value, int64_t least, int64_t most) {
  TORCH_CHECK_VALUE(
      value >= least && value <= most, place, ": ", name, " must be from ", least, " to ", most, ", got ", value);
}

void check_numbers(const Place& place, const Int8LayerPlan& layer) {
  check_between(place, "linear", layer.linear, 0, 1);
  check_between(place, "relu", layer.relu, 0, 1);
  check_between(place, "pool", layer.pool, 0, 1);
  check_between(place, "output_zero_point", layer.output_zero_point, 0, 255);
  check_between(place, "the number of output channels", layer.out_channels, 1, kMaxNumber);
  check_between(place, "the number of input channels", layer.in_channels, 1, kMaxNumber);
  check_between(place, "the height of the kernel", layer.kernel_height, 1, kMaxNumber);
  check_between(place, "the width of the kernel", layer.kernel_width, 1, kMaxNumber);
  check_between(place, "groups", layer.groups, 1, kMaxNumber);
  for (size_t axis = 0; axis < 2; ++axis) {
    check_between(place, "stride", layer.stride[axis], 1, kMaxNumber);
    check_between(place, "padding", layer.padding[axis], 0, kMaxNumber);
    check_between(place, "dilation", layer.dilation[axis], 1, kMaxNumber);
  }
  TORCH_CHECK_VALUE(
      layer.in_channels % layer.groups == 0 && layer.out_channels % layer.groups == 0,
      place,
      ": groups must divide the ",
      layer.in_channels,
      " input channels and the ",
      layer.out_channels,
      " output channels, got ",
      layer.groups);
  const double values =
      product({layer.out_channels, layer.in_channels / layer.groups, layer.kernel_height, layer.kernel_width});
  TORCH_CHECK_VALUE(values < kMaxWeight, place, ": weights of less than 2^26 values are supported, got ", values);
  const int64_t packed = cpu::int8_chain::packed_bytes(layer.shape());
  TORCH_CHECK_VALUE(
      packed < kMaxPacked, place, ": packed parameters of less than 2^31 bytes are supported, got ", packed);
  const bool is_point = layer.kernel_height == 1 && layer.kernel_width == 1 && layer.stride[0] == 1 &&
      layer.stride[1] == 1 && layer.padding[0] == 0 && layer.padding[1] == 0 && layer.dilation[0] == 1 &&
      layer.dilation[1] == 1 && layer.groups == 1 && layer.pool == 0;
  TORCH_CHECK_VALUE(
      !layer.linear || is_point,
      place,
      ": a linear layer must have a 1x1 kernel, stride 1, padding 0, dilation 1, one group and no pool");
}

}  // namespace

cpu::int8_chain::Shape Int8LayerPlan::shape() const {
  return {
      .in_channels = in_channels,
      .height = 1,
      .width = 1,
      .out_channels = out_channels,
      .rows = 1,
      .columns = 1,
      .kernel_height = kernel_height,
      .kernel_width = kernel_width,
      .stride = {stride[0], stride[1]},
      .padding = {padding[0], padding[1]},
      .dilation = {dilation[0], dilation[1]},
      .groups = groups,
      .relu = relu != 0,
      .pool = pool != 0,
      .zero_point = static_cast<int32_t>(input_zero_point),
  };
}

Int8Plan read_int8_plan(const char* op, at::IntArrayRef numbers) {
  TORCH_CHECK_VALUE(
      numbers.size() > 1 && numbers.size() % kInt8LayerNumbers == 1,
      op,
      ": the plan must have 1 number, and ",
      kInt8LayerNumbers,
      " numbers for each of one or more layers, got ",
      numbers.size());
  int64_t zero_point = numbers[0];
  TORCH_CHECK_VALUE(
      zero_point >= 0 && zero_point <= 255, op, ": input_zero_point must be from 0 to 255, got ", zero_point);
  Int8Plan plan;
  plan.reserve(numbers.size() / kInt8LayerNumbers);
  for (size_t start = 1; start < numbers.size(); start += kInt8LayerNumbers) {
    const int64_t* n = numbers.data() + start;
    Int8LayerPlan layer{
        .linear = n[0],
        .out_channels = n[1],
        .in_channels = n[2],
        .kernel_height = n[3],
        .kernel_width = n[4],
        .stride = {n[5], n[6]},
        .padding = {n[7], n[8]},
        .dilation = {n[9], n[10]},
        .groups = n[11],
        .relu = n[12],
        .pool = n[13],
        .output_zero_point = n[14],
        .input_zero_point = zero_point,
        .channels_before = n[2],
    };
    const Place place{op, plan.size()};
    check_numbers(place, layer);
    if (!plan.empty()) {
      const Int8LayerPlan& previous = plan.back();
      TORCH_CHECK_VALUE(layer.linear || !previous.linear, place, ": a convolution cannot follow a linear layer");
      const bool flattens = layer.linear && !previous.linear;
      layer.channels_before = previous.out_channels;
      TORCH_CHECK_VALUE(
          flattens ? layer.in_channels % previous.out_channels == 0 : layer.in_channels == previous.out_channels,
          place,
          ": the number of input channels must be ",
          flattens ? "a multiple of " : "",
          previous.out_channels,
          ", got ",
          layer.in_channels);
    }
    zero_point = layer.output_zero_point;
    plan.push_back(layer);
  }
  return plan;
}

int64_t int8_packed_bytes(const Int8Plan& plan) {
  int64_t bytes = 0;
  for (const auto& layer : plan) {
    bytes += cpu::int8_chain::packed_bytes(layer.shape());
  }
  return bytes;
}

std::vector<Int8LayerSizes> check_int8_chain(
    const Tensor& input, const Tensor& packed, const Int8Plan& plan, double input_scale) {
  constexpr auto op = "int8_chain";
  TORCH_CHECK_VALUE(input.scalar_type() == at::kFloat, op, ": the input must be float32, got ", input.scalar_type());
  const auto scale = static_cast<float>(input_scale);
  TORCH_CHECK_VALUE(
      scale > 0 && 1 / scale > 0 && std::max(scale, 1 / scale) < std::numeric_limits<float>::infinity(),
      op,
      ": input_scale must be positive and finite in float32, and so must be its inverse, got ",
      input_scale);
  TORCH_CHECK_VALUE(
      packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.device() == input.device(),
      op,
      ": packed must be uint8 of one dimension on the device of the input, ",
      input.device(),
      ", got ",
      packed.scalar_type(),
      " of shape ",
      packed.sym_sizes(),
      " on ",
      packed.device());
  const int64_t bytes = int8_packed_bytes(plan);
  TORCH_CHECK_VALUE(
      packed.sym_size(0) == bytes, op, ": packed must have ", bytes, " bytes for this plan, got ", packed.sym_size(0));
  const int64_t dimensions = plan[0].linear ? 2 : 4;
  TORCH_CHECK_VALUE(
      input.dim() == dimensions && input.sym_size(1) == plan[0].in_channels,
      op,
      ": the input must have ",
      dimensions,
      " dimensions and ",
      plan[0].in_channels,
      plan[0].linear ? " features" : " channels",
      ", got shape ",
      input.sym_sizes());

  std::vector<Int8LayerSizes> sizes;
  sizes.reserve(plan.size());
  std::array<SymInt, 2> image{1, 1};
  if (dimensions == 4) {
    image = {input.sym_size(2), input.sym_size(3)};
  }
  double values = 0;
  double last = 0;
  for (size_t l = 0; l < plan.size(); ++l) {
    const Int8LayerPlan& layer = plan[l];
    const Place place{op, l};
    if (layer.linear) {
      TORCH_CHECK_VALUE(
          layer.channels_before * image[0] * image[1] == layer.in_channels,
          place,
          ": the input must have ",
          layer.in_channels,
          " features, got ",
          layer.channels_before,
          "x",
          image[0],
          "x",
          image[1]);
      image = {1, 1};
    }
    std::array<SymInt, 2> output;
    const std::array<int64_t, 2> kernel{layer.kernel_height, layer.kernel_width};
    for (size_t axis = 0; axis < 2; ++axis) {
      const SymInt padded = image[axis] + 2 * layer.padding[axis];
      const int64_t reach = layer.dilation[axis] * (kernel[axis] - 1) + 1;
      const int64_t least = reach + layer.pool * layer.stride[axis];
      TORCH_CHECK_VALUE(
          image[axis] > 0 && image[axis] < kMaxNumber && padded >= least,
          place,
          ": an input of ",
          image[0],
          "x",
          image[1],
          " with padding ",
          at::IntArrayRef(layer.padding),
          " is too small for a kernel of ",
          at::IntArrayRef(kernel),
          " with dilation ",
          at::IntArrayRef(layer.dilation),
          layer.pool ? " and a pool" : "");
      output[axis] = (padded - reach) / layer.stride[axis] + 1;
    }
    values += product({layer.in_channels, image[0] + 2 * layer.padding[0], image[1] + 2 * layer.padding[1]});
    last = product({layer.out_channels, output[0], output[1]});
    TORCH_CHECK_VALUE(
        values + last < kMaxImage, place, ": images of less than 2^30 values in all layers are supported");
    sizes.push_back({image[0], image[1], output[0], output[1]});
    image = output;
    if (layer.pool) {
      image = {output[0] / 2, output[1] / 2};
    }
  }
  TORCH_CHECK_VALUE(
      product({input.sym_size(0)}) * std::max(values, last) < kMaxBatch,
      op,
      ": batches of less than 2^60 values are supported, got an input of shape ",
      input.sym_sizes());
  return sizes;
}

void check_int8_parameters(
    at::TensorList weights, at::TensorList biases, at::TensorList multipliers, const Int8Plan& plan) {
  constexpr auto op = "int8_chain_pack";
  TORCH_CHECK_VALUE(
      weights.size() == plan.size() && biases.size() == plan.size() && multipliers.size() == plan.size(),
      op,
      ": the ",
      plan.size(),
      " layers of the plan must have a weight, a bias and a multiplier each, got ",
      weights.size(),
      ", ",
      biases.size(),
      " and ",
      multipliers.size());
  for (size_t l = 0; l < plan.size(); ++l) {
    const Int8LayerPlan& layer = plan[l];
    const auto check = [&](const char* name, const Tensor& tensor, at::ScalarType type, at::IntArrayRef shape) {
      TORCH_CHECK_VALUE(
          tensor.scalar_type() == type && tensor.sym_sizes() == c10::fromIntArrayRefSlow(shape) &&
              tensor.device() == weights[0].device(),
          Place{op, l},
          ": the ",
          name,
          " must be ",
          type,
          " of shape ",
          shape,
          " on the device of the first weight, ",
          weights[0].device(),
          ", got ",
          tensor.scalar_type(),
          " of shape ",
          tensor.sym_sizes(),
          " on ",
          tensor.device());
    };
    const std::array<int64_t, 4> sizes{
        layer.out_channels, layer.in_channels / layer.groups, layer.kernel_height, layer.kernel_width};
    check("weight", weights[l], at::kChar, at::IntArrayRef(sizes).slice(0, layer.linear ? 2 : 4));
    check("bias", biases[l], at::kInt, {layer.out_channels});
    check("multiplier", multipliers[l], at::kFloat, {layer.out_channels});
  }
}

Tensor allocate_int8_output(const Tensor& input, const Int8Plan& plan, const std::vector<Int8LayerSizes>& sizes) {
  const Int8LayerPlan& last = plan.back();
  if (last.linear) {
    return empty_symint({input.sym_size(0), last.out_channels}, input.options());
  }
  const int64_t window = last.pool ? 2 : 1;
  return empty_symint(
      {input.sym_size(0), last.out_channels, sizes.back().rows / window, sizes.back().columns / window},
      input.options(),
      at::MemoryFormat::ChannelsLast);
}

}  // namespace lightkit
