// lightkit::conv_relu_pool: schema, shapes for tracing, the call of the CPU kernels, and autograd.
//
// The forward pass keeps of the convolution's output only what the pool lets through, and a byte for each value that
// says where it came from. backward needs that byte, the input and the weight.

#include "../kernels/cpu/conv_relu_pool.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <type_traits>

namespace lightkit {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

void check_arguments(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef padding, bool pool) {
  TORCH_CHECK_VALUE(
      input.dim() == 4 && weight.dim() == 4,
      "conv_relu_pool: input and weight must have 4 dimensions, got ",
      input.sym_sizes(),
      " and ",
      weight.sym_sizes());
  TORCH_CHECK_VALUE(
      weight.sym_size(1) == input.sym_size(1),
      "conv_relu_pool: the weight is for ",
      weight.sym_size(1),
      " channels but the input has ",
      input.sym_size(1));
  TORCH_CHECK(
      input.scalar_type() == weight.scalar_type() && input.device() == weight.device() &&
          at::isFloatingType(input.scalar_type()),
      "conv_relu_pool: input and weight must be of one floating-point dtype and on one device, got ",
      input.scalar_type(),
      " on ",
      input.device(),
      " and ",
      weight.scalar_type(),
      " on ",
      weight.device());
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
        "conv_relu_pool: the bias must hold one value for each of the ",
        weight.sym_size(0),
        " output channels, got shape ",
        bias->sym_sizes());
    TORCH_CHECK(
        bias->scalar_type() == input.scalar_type() && bias->device() == input.device(),
        "conv_relu_pool: the bias must be of the dtype and on the device of the input, got ",
        bias->scalar_type(),
        " on ",
        bias->device());
  }
  TORCH_CHECK_VALUE(
      padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0,
      "conv_relu_pool: padding must be two numbers from 0 up, got ",
      padding);
  TORCH_CHECK_VALUE(
      weight.sym_numel() > 0, "conv_relu_pool: the weight must not be empty, got shape ", weight.sym_sizes());
  for (int64_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(
        input.sym_size(2 + d) + 2 * padding[d] - weight.sym_size(2 + d) + 1 >= (pool ? 2 : 1),
        "conv_relu_pool: an input of ",
        input.sym_size(2),
        "x",
        input.sym_size(3),
        " with padding ",
        padding,
        " is too small for a kernel of ",
        weight.sym_size(2),
        "x",
        weight.sym_size(3),
        pool ? " and a pool of 2x2" : "");
  }
}

std::vector<c10::SymInt> output_sizes(const Tensor& input, const Tensor& weight, at::IntArrayRef padding, bool pool) {
  const auto size = [&](int64_t d) {
    const auto convolved = input.sym_size(2 + d) + 2 * padding[d] - weight.sym_size(2 + d) + 1;
    return pool ? convolved / 2 : convolved;
  };
  return {input.sym_size(0), weight.sym_size(0), size(0), size(1)};
}

std::tuple<Tensor, Tensor> forward_meta(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef padding,
    bool pool,
    bool with_index) {
  check_arguments(input, weight, bias, padding, pool);
  const auto sizes = output_sizes(input, weight, padding, pool);
  const auto bytes = input.options().dtype(at::kByte);
  return {
      at::empty_symint(sizes, input.options(), kLayout),
      with_index ? at::empty_symint(sizes, bytes, kLayout) : at::empty_symint({0}, bytes)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// The gradients that `wanted` names, of input, weight and bias; (0) for the others.
Gradients backward_meta(
    const Tensor& grad_output,
    const Tensor& index,
    const Tensor& input,
    const Tensor& weight,
    at::IntArrayRef padding,
    bool pool,
    std::array<bool, 3> wanted) {
  const auto none = [&] { return at::empty_symint({0}, input.options()); };
  return {
      wanted[0] ? at::empty_symint(input.sym_sizes(), input.options(), kLayout) : none(),
      wanted[1] ? at::empty_symint(weight.sym_sizes(), weight.options()) : none(),
      wanted[2] ? at::empty_symint({weight.sym_size(0)}, weight.options()) : none()};
}

// What the kernels compute in.
at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Padded, in the dtype of the computation, channels last: the kernels know no padding and no half precision.
Tensor laid_out(const Tensor& tensor, at::IntArrayRef padding) {
  Tensor result = tensor.to(compute_type(tensor.scalar_type()));
  if (padding[0] != 0 || padding[1] != 0) {
    result = at::constant_pad_nd(result, {padding[1], padding[1], padding[0], padding[0]});
  }
  return result.contiguous(kLayout);
}

cpu::ConvReluPoolShape make_shape(const Tensor& padded, const Tensor& weight, bool pool) {
  // Places within an image, and within the weight with its rows filled up to vectors, are 32-bit numbers.
  TORCH_CHECK_VALUE(
      padded.numel() / padded.size(0) < (int64_t(1) << 30) && weight.numel() < (int64_t(1) << 26),
      "conv_relu_pool: images of up to 2^30 values and weights of up to 2^26 are supported, got ",
      padded.sizes(),
      " and ",
      weight.sizes());
  return {
      .images = padded.size(0),
      .height = padded.size(2),
      .width = padded.size(3),
      .in_channels = padded.size(1),
      .out_channels = weight.size(0),
      .kernel_height = weight.size(2),
      .kernel_width = weight.size(3),
      .pool = pool,
  };
}

// Calls f with a value of the type that the kernels compute in.
template <typename F>
void with_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

std::tuple<Tensor, Tensor> forward_cpu(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef padding,
    bool pool,
    bool with_index) {
  auto [result, index] = forward_meta(input, weight, bias, padding, pool, with_index);
  if (result.numel() == 0) {
    return {result, index};
  }
  const Tensor x = laid_out(input, padding);
  const Tensor w = weight.to(x.scalar_type()).contiguous();
  const Tensor b = bias.has_value() && bias->defined() ? bias->to(x.scalar_type()).contiguous() : Tensor();
  const Tensor output =
      result.scalar_type() == x.scalar_type() ? result : at::empty(result.sizes(), x.options(), kLayout);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::conv_relu_pool_forward<T>(
        make_shape(x, w, pool),
        x.const_data_ptr<T>(),
        w.const_data_ptr<T>(),
        b.defined() ? b.const_data_ptr<T>() : nullptr,
        output.mutable_data_ptr<T>(),
        with_index ? index.mutable_data_ptr<uint8_t>() : nullptr);
  });
  if (!output.is_same(result)) {
    result.copy_(output);
  }
  return {result, index};
}

Gradients backward_cpu(
    const Tensor& grad_output,
    const Tensor& index,
    const Tensor& input,
    const Tensor& weight,
    at::IntArrayRef padding,
    bool pool,
    std::array<bool, 3> wanted) {
  check_arguments(input, weight, {}, padding, pool);
  const auto sizes = output_sizes(input, weight, padding, pool);
  TORCH_CHECK_VALUE(
      grad_output.sym_sizes() == sizes && index.sym_sizes() == sizes && index.scalar_type() == at::kByte &&
          grad_output.scalar_type() == input.scalar_type(),
      "conv_relu_pool: the gradient and the index must have the shape of the output, ",
      c10::SymIntArrayRef(sizes),
      ", and the dtypes of forward, got ",
      grad_output.sym_sizes(),
      " and ",
      index.sym_sizes());
  auto [grad_input, grad_weight, grad_bias] =
      backward_meta(grad_output, index, input, weight, padding, pool, wanted);
  if (grad_output.numel() == 0) {
    return {grad_input.zero_(), grad_weight.zero_(), grad_bias.zero_()};
  }
  const Tensor g = grad_output.to(compute_type(grad_output.scalar_type())).contiguous(kLayout);
  const Tensor winners = index.contiguous(kLayout);
  const auto type = g.options();
  if (wanted[0]) {
    const Tensor w = weight.to(g.scalar_type()).contiguous();
    const std::vector<int64_t> padded{
        input.size(0), input.size(1), input.size(2) + 2 * padding[0], input.size(3) + 2 * padding[1]};
    const bool direct = grad_input.sizes() == padded && grad_input.scalar_type() == g.scalar_type();
    const Tensor result = direct ? grad_input : at::empty(padded, type, kLayout);
    with_type(g, [&](auto zero) {
      using T = decltype(zero);
      cpu::conv_relu_pool_grad_input<T>(
          make_shape(result, w, pool),
          g.const_data_ptr<T>(),
          winners.const_data_ptr<uint8_t>(),
          w.const_data_ptr<T>(),
          result.mutable_data_ptr<T>());
    });
    if (!direct) {
      grad_input.copy_(result.narrow(2, padding[0], input.size(2)).narrow(3, padding[1], input.size(3)));
    }
  }
  if (wanted[1] || wanted[2]) {
    const Tensor x = laid_out(input, padding);
    // One pass makes both: the bias costs next to nothing.
    const Tensor weights = at::empty(weight.sizes(), type);
    const Tensor biases = at::empty({weight.size(0)}, type);
    with_type(g, [&](auto zero) {
      using T = decltype(zero);
      cpu::conv_relu_pool_grad_weight<T>(
          make_shape(x, weight, pool),
          g.const_data_ptr<T>(),
          winners.const_data_ptr<uint8_t>(),
          x.const_data_ptr<T>(),
          weights.mutable_data_ptr<T>(),
          biases.mutable_data_ptr<T>());
    });
    grad_weight = wanted[1] ? weights.to(weight.scalar_type()) : grad_weight;
    grad_bias = wanted[2] ? biases.to(weight.scalar_type()) : grad_bias;
  }
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> call_forward(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef padding,
    bool pool,
    bool with_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_conv_relu_pool_forward", "")
                             .typed<decltype(forward_meta)>();
  return op.call(input, weight, bias, padding, pool, with_index);
}

Gradients call_backward(
    const Tensor& grad_output,
    const Tensor& index,
    const Tensor& input,
    const Tensor& weight,
    at::IntArrayRef padding,
    bool pool,
    std::array<bool, 3> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_conv_relu_pool_backward", "")
                             .typed<decltype(backward_meta)>();
  return op.call(grad_output, index, input, weight, padding, pool, wanted);
}

// The gradients written with differentiable operations, for backward with create_graph=True: the gradient of the
// convolution's whole output, most of it 0, and torch's own backward of a convolution. Which positions won does not
// change with the input, nearly everywhere.
Gradients differentiable_gradients(
    const Tensor& grad_output,
    const Tensor& index,
    const Tensor& input,
    const Tensor& weight,
    at::IntArrayRef padding,
    bool pool,
    std::array<bool, 3> wanted) {
  Tensor gradient = grad_output.masked_fill(index == cpu::kDead, 0);
  if (pool) {
    const auto rows = input.sym_size(2) + 2 * padding[0] - weight.sym_size(2) + 1;
    const auto columns = input.sym_size(3) + 2 * padding[1] - weight.sym_size(3) + 1;
    const auto options = index.options().dtype(at::kLong);
    const Tensor winner = index.to(at::kLong).bitwise_and(3);
    const Tensor row = 2 * at::arange(index.size(2), options).unsqueeze(1) + winner.bitwise_right_shift(1);
    const Tensor column = 2 * at::arange(index.size(3), options) + winner.bitwise_and(1);
    const auto images = index.sym_size(0);
    const auto channels = index.sym_size(1);
    gradient = at::zeros_symint({images, channels, rows * columns}, gradient.options())
                   .scatter(2, (row * columns + column).flatten(2), gradient.flatten(2))
                   .view_symint({images, channels, rows, columns});
  }
  return at::convolution_backward(
      gradient, input, weight, at::IntArrayRef{weight.size(0)}, {1, 1}, padding, {1, 1}, false, {0, 0}, 1, wanted);
}

class ConvReluPool : public torch::autograd::Function<ConvReluPool> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& input,
      const Tensor& weight,
      const std::optional<Tensor>& bias,
      at::IntArrayRef padding,
      bool pool) {
    Tensor output, index;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(output, index) = call_forward(input, weight, bias, padding, pool, /*with_index=*/true);
    }
    ctx->save_for_backward({input, weight, index});
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["pool"] = pool;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& grad_output = grad_outputs[0];
    variable_list gradients(5);
    if (grad_output.defined()) {
      const auto saved = ctx->get_saved_variables();
      const auto padding = ctx->saved_data["padding"].toIntVector();
      const bool pool = ctx->saved_data["pool"].toBool();
      const bool has_bias = ctx->saved_data["has_bias"].toBool();
      const std::array<bool, 3> wanted{
          ctx->needs_input_grad(0), ctx->needs_input_grad(1), has_bias && ctx->needs_input_grad(2)};
      const auto compute = at::GradMode::is_enabled() ? differentiable_gradients : call_backward;
      auto [grad_input, grad_weight, grad_bias] =
          compute(grad_output, saved[2], saved[0], saved[1], padding, pool, wanted);
      gradients[0] = wanted[0] ? grad_input : Tensor();
      gradients[1] = wanted[1] ? grad_weight : Tensor();
      gradients[2] = wanted[2] ? grad_bias : Tensor();
    }
    return gradients;
  }
};

Tensor conv_relu_pool(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef padding, bool pool) {
  return std::get<0>(call_forward(input, weight, bias, padding, pool, /*with_index=*/false));
}

Tensor conv_relu_pool_autograd(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef padding, bool pool) {
  const bool needs_gradient = input.requires_grad() || weight.requires_grad() ||
      (bias.has_value() && bias->defined() && bias->requires_grad());
  if (at::GradMode::is_enabled() && needs_gradient) {
    return ConvReluPool::apply(input, weight, bias, padding, pool);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return conv_relu_pool(input, weight, bias, padding, pool);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
  m.def("conv_relu_pool(Tensor input, Tensor weight, Tensor? bias, int[2] padding, bool pool) -> Tensor");
  m.def(
      "_conv_relu_pool_forward(Tensor input, Tensor weight, Tensor? bias, int[2] padding, bool pool, "
      "bool with_index) -> (Tensor output, Tensor index)");
  m.def(
      "_conv_relu_pool_backward(Tensor grad_output, Tensor index, Tensor input, Tensor weight, int[2] padding, "
      "bool pool, bool[3] wanted) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(lightkit, CPU, m) {
  m.impl("_conv_relu_pool_forward", forward_cpu);
  m.impl("_conv_relu_pool_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_conv_relu_pool_forward", forward_meta);
  m.impl("_conv_relu_pool_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("conv_relu_pool", conv_relu_pool);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("conv_relu_pool", conv_relu_pool_autograd);
}

}  // namespace lightkit
