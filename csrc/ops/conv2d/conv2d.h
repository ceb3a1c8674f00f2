// The op lightkit::conv2d, and the functions that its files share.
#pragma once

#include "../common/checks.h"
#include "../common/tensors.h"

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace lightkit {

inline constexpr auto kConv2dLayout = at::MemoryFormat::ChannelsLast;

// Whether the gradients of input, weight and bias are wanted.
using Conv2dWanted = std::array<bool, 3>;

#define LIGHTKIT_CONV2D_PARAMETERS \
  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups
#define LIGHTKIT_CONV2D_ARGUMENTS stride, padding, dilation, groups

// Output and statistics. The statistics are [0] unless they are wanted.
using Conv2dResults = std::tuple<at::Tensor, at::Tensor>;

// lightkit::conv2d.
using Conv2dOp = Conv2dResults(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    LIGHTKIT_CONV2D_PARAMETERS,
    bool statistics);
Conv2dOp conv2d_meta, conv2d_cpu, conv2d_autograd, call_conv2d;

// The gradients of input, weight and bias; those that are not wanted are [0].
using Conv2dGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// lightkit::_conv2d_backward.
using Conv2dBackwardOp = Conv2dGradients(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& weight,
    LIGHTKIT_CONV2D_PARAMETERS,
    Conv2dWanted wanted);
Conv2dBackwardOp conv2d_backward_meta, conv2d_backward_cpu, call_conv2d_backward;

// Raises for arguments that do not fit; returns the sizes of the output, which may be symbols.
std::vector<c10::SymInt> check_conv2d(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    LIGHTKIT_CONV2D_PARAMETERS);

// Checks the arguments of backward.
void check_conv2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, LIGHTKIT_CONV2D_PARAMETERS);

// Allocates the results.
Conv2dResults allocate_conv2d(const at::Tensor& input, at::SymIntArrayRef sizes, bool statistics);
Conv2dGradients allocate_conv2d_gradients(
    const at::Tensor& input, const at::Tensor& weight, const Conv2dWanted& wanted);

}  // namespace lightkit
