// lightkit::conv2d on a CPU: layout, memory, and the kernels.

#include "../../kernels/cpu/conv2d/conv2d.h"
#include "conv2d.h"

#include <limits>

namespace lightkit {
namespace {

using at::Tensor;

cpu::conv2d::Shape shape_of(const Tensor& input, const Tensor& weight, LIGHTKIT_CONV2D_PARAMETERS) {
  const auto axis = [&](int64_t i) {
    return cpu::conv2d::Axis{
        .size = input.size(2 + i),
        .kernel = weight.size(2 + i),
        .stride = stride[i],
        .padding = padding[i],
        .dilation = dilation[i]};
  };
  return {
      .images = input.size(0),
      .in_channels = input.size(1),
      .out_channels = weight.size(0),
      .groups = groups,
      .rows = axis(0),
      .columns = axis(1)};
}

// Returns the input as the kernels read it: with the channels side by side. They gather up to three channels, those of
// images, from any memory format.
Tensor laid_out(const Tensor& input, int64_t groups) {
  constexpr int64_t kMaxGathered = 3;
  const bool is_read_as_it_is = input.size(1) / groups <= kMaxGathered || input.stride(1) == 1;
  return is_read_as_it_is ? input : input.contiguous(kConv2dLayout);
}

template <typename T>
cpu::conv2d::Images<const T> images_of(const Tensor& input) {
  return {input.const_data_ptr<T>(), input.stride(0), input.stride(2), input.stride(3), input.stride(1)};
}

// Calls f(scalar_t()) with the type of a tensor.
template <typename F>
void with_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

template <typename T>
T* place_of(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr<T>() : nullptr;
}

}  // namespace

Conv2dResults conv2d_cpu(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    LIGHTKIT_CONV2D_PARAMETERS,
    bool statistics) {
  const auto sizes = check_conv2d(input, weight, bias, LIGHTKIT_CONV2D_ARGUMENTS);
  check_memory("conv2d", "the input", input);
  check_memory("conv2d", "the weight", weight);
  check_memory("conv2d", "the bias", bias);
  const Conv2dResults results = allocate_conv2d(input, sizes, statistics);
  const auto& [output, moments] = results;
  if (output.numel() == 0) {
    // The mean of no values.
    moments.fill_(std::numeric_limits<double>::quiet_NaN());
    return results;
  }
  const Tensor x = laid_out(input, groups);
  const Tensor w = weight.contiguous();
  const Tensor b = is_there(bias) ? bias->contiguous() : Tensor();
  with_type(input, [&](auto zero) {
    using T = decltype(zero);
    T* const mean = place_of<T>(moments, statistics);
    cpu::conv2d::forward<T>(
        shape_of(x, w, LIGHTKIT_CONV2D_ARGUMENTS),
        images_of<T>(x),
        w.const_data_ptr<T>(),
        data_or_null<T>(b),
        output.mutable_data_ptr<T>(),
        mean,
        statistics ? mean + w.size(0) : nullptr);
  });
  return results;
}

Conv2dGradients conv2d_backward_cpu(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& weight,
    LIGHTKIT_CONV2D_PARAMETERS,
    Conv2dWanted wanted) {
  check_conv2d_backward(grad_output, input, weight, LIGHTKIT_CONV2D_ARGUMENTS);
  check_memory("conv2d", "the gradient", grad_output);
  check_memory("conv2d", "the input", input);
  check_memory("conv2d", "the weight", weight);
  const Conv2dGradients gradients = allocate_conv2d_gradients(input, weight, wanted);
  const auto& [of_input, of_weight, of_bias] = gradients;
  if (grad_output.numel() == 0) {
    of_input.zero_();
    of_weight.zero_();
    of_bias.zero_();
    return gradients;
  }
  const Tensor g = grad_output.contiguous(kConv2dLayout);
  with_type(input, [&](auto zero) {
    using T = decltype(zero);
    const auto shape = shape_of(input, weight, LIGHTKIT_CONV2D_ARGUMENTS);
    if (wanted[0]) {
      const Tensor w = weight.contiguous();
      cpu::conv2d::grad_input<T>(shape, g.const_data_ptr<T>(), w.const_data_ptr<T>(), of_input.mutable_data_ptr<T>());
    }
    if (wanted[1] || wanted[2]) {
      const Tensor x = wanted[1] ? laid_out(input, groups) : input;
      cpu::conv2d::grad_weight<T>(
          shape,
          images_of<T>(x),
          g.const_data_ptr<T>(),
          place_of<T>(of_weight, wanted[1]),
          place_of<T>(of_bias, wanted[2]));
    }
  });
  return gradients;
}

}  // namespace lightkit
