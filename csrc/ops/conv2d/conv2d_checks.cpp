// Checks of the arguments of lightkit::conv2d, and the sizes of its results, also for symbolic sizes.

#include "conv2d.h"

#include <algorithm>

namespace lightkit {

using at::Tensor;
using c10::SymInt;

namespace {

constexpr auto kOp = "conv2d";

// The most values of an image and of a weight. Derived: the sizes of the kernels' buffers have room in 64 bits.
constexpr double kMaxImage = 0x1p30;
constexpr int64_t kMaxWeight = int64_t(1) << 26;

// The most values of a batch. Derived: their bytes are counted in 64 bits.
constexpr double kMaxBatch = 0x1p60;

void check_pair(const char* name, at::IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(
      pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) < int64_t(1) << 30,
      kOp,
      ": ",
      name,
      " must be two numbers from ",
      least,
      " up and less than 2^30, got ",
      pair);
}

}  // namespace

std::vector<SymInt> check_conv2d(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, LIGHTKIT_CONV2D_PARAMETERS) {
  check_single_or_double(kOp, input);
  TORCH_CHECK_VALUE(
      input.dim() == 4 && weight.dim() == 4,
      kOp,
      ": input and weight must have 4 dimensions, got ",
      input.sym_sizes(),
      " and ",
      weight.sym_sizes());
  check_same_kind(kOp, "the weight", weight, input);
  TORCH_CHECK_VALUE(weight.sym_numel() > 0, kOp, ": the weight must not be empty, got shape ", weight.sym_sizes());
  TORCH_CHECK_VALUE(
      weight.sym_numel().maybe_as_int().value_or(0) < kMaxWeight,
      kOp,
      ": weights of less than 2^26 values are supported, got shape ",
      weight.sym_sizes());
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  const SymInt channels = input.sym_size(1);
  const SymInt out_channels = weight.sym_size(0);
  TORCH_CHECK_VALUE(
      groups > 0 && groups < kMaxWeight && out_channels % groups == 0 && weight.sym_size(1) * groups == channels,
      kOp,
      ": a weight of shape ",
      weight.sym_sizes(),
      " in ",
      groups,
      " groups does not fit an input of ",
      channels,
      " channels");
  if (is_there(bias)) {
    check_same_kind(kOp, "the bias", *bias, input);
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->sym_size(0) == out_channels,
        kOp,
        ": the bias must hold one value for each of the ",
        out_channels,
        " output channels, got shape ",
        bias->sym_sizes());
  }
  std::vector<SymInt> sizes{input.sym_size(0), out_channels};
  for (int64_t axis = 0; axis < 2; ++axis) {
    const SymInt padded = input.sym_size(2 + axis) + 2 * padding[axis];
    const SymInt reach = dilation[axis] * (weight.sym_size(2 + axis) - 1) + 1;
    TORCH_CHECK_VALUE(
        input.sym_size(2 + axis) > 0 && padded >= reach,
        kOp,
        ": an input of shape ",
        input.sym_sizes(),
        " with padding ",
        padding,
        " is too small for a weight of shape ",
        weight.sym_sizes(),
        " with dilation ",
        dilation);
    sizes.push_back((padded - reach) / stride[axis] + 1);
  }
  const double image = product({channels, input.sym_size(2) + 2 * padding[0], input.sym_size(3) + 2 * padding[1]});
  TORCH_CHECK_VALUE(
      image < kMaxImage && product({out_channels, sizes[2], sizes[3]}) < kMaxImage,
      kOp,
      ": images of less than 2^30 values are supported, got an input of shape ",
      input.sym_sizes(),
      " with padding ",
      padding,
      " and an output of shape ",
      at::SymIntArrayRef(sizes));
  TORCH_CHECK_VALUE(
      std::max(product({sizes[0]}) * image, product({sizes[0], sizes[1], sizes[2], sizes[3]})) < kMaxBatch,
      kOp,
      ": batches of less than 2^60 values are supported, got an input of shape ",
      input.sym_sizes());
  return sizes;
}

void check_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, LIGHTKIT_CONV2D_PARAMETERS) {
  const auto sizes = check_conv2d(input, weight, std::nullopt, LIGHTKIT_CONV2D_ARGUMENTS);
  check_same_kind(kOp, "the gradient", grad_output, input);
  TORCH_CHECK_VALUE(
      grad_output.sym_sizes() == at::SymIntArrayRef(sizes),
      kOp,
      ": the gradient must have the shape of the output, ",
      at::SymIntArrayRef(sizes),
      ", got ",
      grad_output.sym_sizes());
}

Conv2dResults allocate_conv2d(const Tensor& input, at::SymIntArrayRef sizes, bool statistics) {
  const std::vector<SymInt> of_statistics = statistics ? std::vector<SymInt>{2, sizes[1]} : std::vector<SymInt>{0};
  return {empty_symint(sizes, input.options(), kConv2dLayout), empty_symint(of_statistics, input.options())};
}

Conv2dGradients allocate_conv2d_gradients(const Tensor& input, const Tensor& weight, const Conv2dWanted& wanted) {
  const std::vector<SymInt> none{0};
  const std::vector<SymInt> channels{weight.sym_size(0)};
  return {
      wanted[0] ? empty_symint(input.sym_sizes(), input.options(), kConv2dLayout) : empty_symint(none, input.options()),
      empty_symint(wanted[1] ? weight.sym_sizes() : at::SymIntArrayRef(none), input.options()),
      empty_symint(wanted[2] ? channels : none, input.options())};
}

}  // namespace lightkit
