// lightkit::layer_chain, and conv_relu_pool, which is a chain of one: schemas, shapes for tracing, the call of the CPU
// kernels, and autograd.
//
// A layer is a convolution or, with a weight of two dimensions, a linear layer: a convolution whose kernel is as large as
// its input. The forward pass keeps of a convolution's output only what a pool lets through, and a byte for each value
// that says where it came from.

#include "../kernels/cpu/layer_chain.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <ostream>
#include <tuple>
#include <vector>

namespace lightkit {
namespace {

using at::Tensor;
using at::TensorList;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensors = c10::List<std::optional<Tensor>>;

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

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

bool is_there(const std::optional<Tensor>& bias) {
  return bias.has_value() && bias->defined();
}

// Whom an error is about.
struct Where {
  const char* op;
  int64_t layer = -1;
};

std::ostream& operator<<(std::ostream& stream, const Where& where) {
  stream << where.op;
  return where.layer < 0 ? stream : stream << ": layer " << where.layer;
}

// A layer's sizes, which may be symbols: of its input without padding, its kernel, and its output.
struct Sizes {
  SymInt channels, height, width;
  SymInt out_channels, kernel_height, kernel_width;
  SymInt rows, columns;
  bool linear;
};

void check_same_kind(const Where& where, const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type() && tensor.device() == input.device(),
      where,
      ": the ",
      name,
      " must be of the dtype and on the device of the input, ",
      input.scalar_type(),
      " on ",
      input.device(),
      ", got ",
      tensor.scalar_type(),
      " on ",
      tensor.device());
}

// `before` holds channels, height and width of what comes in, and gets those of what goes out.
Sizes check_layer(
    const Where& where,
    const Tensor& input,
    std::array<SymInt, 3>& before,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    at::IntArrayRef padding,
    bool pool) {
  check_same_kind(where, "weight", weight, input);
  TORCH_CHECK_VALUE(
      weight.dim() == 4 || weight.dim() == 2,
      where,
      ": the weight must have 4 dimensions, or 2 of a linear layer, got ",
      weight.sym_sizes());
  TORCH_CHECK_VALUE(weight.sym_numel() > 0, where, ": the weight must not be empty, got shape ", weight.sym_sizes());
  TORCH_CHECK_VALUE(
      padding[0] >= 0 && padding[1] >= 0, where, ": padding must be two numbers from 0 up, got ", padding);
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
    check_same_kind(where, "bias", *bias, input);
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
  Sizes sizes{
      channels,
      height,
      width,
      weight.sym_size(0),
      kernel_height,
      kernel_width,
      pool ? rows / 2 : rows,
      pool ? columns / 2 : columns,
      linear};
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
}

// Channels, height and width of an image.
std::array<SymInt, 3> image_sizes(const Tensor& input) {
  if (input.dim() == 2) {
    return {input.sym_size(1), 1, 1};
  }
  return {input.sym_size(1), input.sym_size(2), input.sym_size(3)};
}

std::vector<Sizes> check_chain(
    const Tensor& input, TensorList weights, const std::vector<std::optional<Tensor>>& biases, const Settings& settings) {
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
  check_input(op, input);
  auto before = image_sizes(input);
  std::vector<Sizes> sizes;
  for (size_t l = 0; l < count; ++l) {
    TORCH_CHECK_VALUE(
        weights[l].dim() == 2 || (l == 0 ? input.dim() == 4 : !sizes.back().linear),
        Where{op, static_cast<int64_t>(l)},
        ": a convolution cannot follow a linear layer");
    sizes.push_back(check_layer(
        {op, static_cast<int64_t>(l)},
        input,
        before,
        weights[l],
        biases[l],
        settings.padding(l),
        settings.pool(l)));
  }
  return sizes;
}

std::vector<SymInt> output_sizes(const Tensor& input, const Sizes& last) {
  if (last.linear) {
    return {input.sym_size(0), last.out_channels};
  }
  return {input.sym_size(0), last.out_channels, last.rows, last.columns};
}

// What the kernels compute in.
at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Of the padded inputs of all layers but the first, and of the outputs of all.
std::pair<SymInt, SymInt> kept_sizes(const Tensor& input, const std::vector<Sizes>& sizes, const Settings& settings) {
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

std::vector<std::optional<Tensor>> as_vector(const OptionalTensors& tensors) {
  return {tensors.begin(), tensors.end()};
}

using Forward = std::tuple<Tensor, Tensor, Tensor>;

// The output, and for backward the activations and the index: (0) unless `keep`.
Forward allocate(const Tensor& input, const std::vector<Sizes>& sizes, const Settings& settings, bool keep) {
  const auto output = output_sizes(input, sizes.back());
  const auto [activations, outputs] = kept_sizes(input, sizes, settings);
  const auto options = input.options();
  return {
      output.size() == 4 ? at::empty_symint(output, options, kLayout) : at::empty_symint(output, options),
      at::empty_symint({keep ? activations : SymInt(0)}, options.dtype(compute_type(input.scalar_type()))),
      at::empty_symint({keep ? outputs : SymInt(0)}, options.dtype(at::kByte))};
}

Forward forward_meta(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers,
    bool keep) {
  const Settings settings{numbers};
  return allocate(input, check_chain(input, weights, as_vector(biases), settings), settings, keep);
}

// The gradients that `wanted` names, of the input, the weights and the biases; (0) for the others.
std::vector<Tensor> backward_meta(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    const Tensor& activations,
    const Tensor& index,
    at::IntArrayRef numbers,
    at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(
      wanted.size() == 1 + 2 * weights.size(),
      "layer_chain: `wanted` must have a flag for the input and two for each layer, got ",
      wanted.size());
  const auto empty = [&](bool is_wanted, at::SymIntArrayRef sizes, bool image) {
    const std::vector<SymInt> none{0};
    return image && is_wanted ? at::empty_symint(sizes, input.options(), kLayout)
                              : at::empty_symint(is_wanted ? sizes : at::SymIntArrayRef(none), input.options());
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

// Padded, in the dtype of the computation, channels last: the kernels know no padding there and no half precision.
Tensor laid_out(const Tensor& tensor, at::IntArrayRef padding) {
  Tensor result = tensor.to(compute_type(tensor.scalar_type()));
  if (tensor.dim() == 2) {
    return result.contiguous();
  }
  if (padding[0] != 0 || padding[1] != 0) {
    result = at::constant_pad_nd(result, {padding[1], padding[1], padding[0], padding[0]});
  }
  return result.contiguous(kLayout);
}

// A chain as the kernels take it, and the tensors that its pointers are into.
template <typename T>
struct Prepared {
  std::vector<cpu::ChainLayer<T>> layers;
  std::vector<Tensor> held;

  Prepared(
      const std::vector<Sizes>& sizes,
      TensorList weights,
      const std::vector<std::optional<Tensor>>& biases,
      const Settings& settings) {
    const auto hold = [&](const Tensor& tensor) {
      held.push_back(tensor.to(c10::CppTypeToScalarType<T>::value).contiguous());
      return held.back().template const_data_ptr<T>();
    };
    for (size_t l = 0; l < sizes.size(); ++l) {
      const auto number = [](const SymInt& size) { return size.expect_int(); };
      const auto& s = sizes[l];
      const std::array<int64_t, 2> padding{settings.padding(l)[0], settings.padding(l)[1]};
      const cpu::ConvReluPoolShape shape{
          .height = number(s.height) + 2 * padding[0],
          .width = number(s.width) + 2 * padding[1],
          .in_channels = number(s.channels),
          .out_channels = number(s.out_channels),
          .kernel_height = number(s.kernel_height),
          .kernel_width = number(s.kernel_width),
          .relu = settings.relu(l),
          .pool = settings.pool(l),
      };
      // Places within an image, and within the weight with its rows filled up to vectors, are 32-bit numbers.
      TORCH_CHECK_VALUE(
          shape.image_size() < (int64_t(1) << 30) && shape.output_size() < (int64_t(1) << 30) &&
              weights[l].numel() < (int64_t(1) << 26),
          Where{"layer_chain", static_cast<int64_t>(l)},
          ": images of up to 2^30 values and weights of up to 2^26 are supported, got ",
          shape.image_size(),
          ", ",
          shape.output_size(),
          " and ",
          weights[l].numel());
      const bool biased = l < biases.size() && is_there(biases[l]);
      layers.push_back({shape, padding, hold(weights[l]), biased ? hold(*biases[l]) : nullptr});
    }
  }
};

// Calls f with a value of the type that the kernels compute in.
template <typename F>
void with_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

Forward forward_cpu(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers,
    bool keep) {
  const Settings settings{numbers};
  const auto all_biases = as_vector(biases);
  const auto sizes = check_chain(input, weights, all_biases, settings);
  auto [result, activations, index] = allocate(input, sizes, settings, keep);
  if (result.numel() == 0) {
    return {result, activations, index};
  }
  const Tensor x = laid_out(input, settings.padding(0));
  // Half precision is rounded once.
  const Tensor output =
      result.scalar_type() == x.scalar_type() ? result : at::empty_like(result, x.options());
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Prepared<T> prepared(sizes, weights, all_biases, settings);
    cpu::layer_chain_forward<T>(
        prepared.layers,
        x.size(0),
        x.const_data_ptr<T>(),
        output.mutable_data_ptr<T>(),
        keep ? activations.mutable_data_ptr<T>() : nullptr,
        keep ? index.mutable_data_ptr<uint8_t>() : nullptr);
  });
  if (!output.is_same(result)) {
    result.copy_(output);
  }
  return {result, activations, index};
}

std::vector<Tensor> backward_cpu(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    const Tensor& activations,
    const Tensor& index,
    at::IntArrayRef numbers,
    at::IntArrayRef wanted) {
  const Settings settings{numbers};
  const size_t count = weights.size();
  const auto sizes = check_chain(input, weights, std::vector<std::optional<Tensor>>(count), settings);
  const auto [kept, outputs] = kept_sizes(input, sizes, settings);
  TORCH_CHECK_VALUE(
      grad_output.sym_sizes() == output_sizes(input, sizes.back()) &&
          grad_output.scalar_type() == input.scalar_type() && index.sym_numel() == outputs &&
          index.scalar_type() == at::kByte && activations.sym_numel() == kept &&
          activations.scalar_type() == compute_type(input.scalar_type()),
      "layer_chain: the gradient must have the shape of the output, ",
      output_sizes(input, sizes.back()),
      ", and activations and index the sizes and dtypes of forward, got ",
      grad_output.sym_sizes(),
      ", ",
      activations.sym_sizes(),
      " and ",
      index.sym_sizes());
  auto gradients =
      backward_meta(grad_output, input, weights, activations, index, numbers, wanted);
  if (grad_output.numel() == 0) {
    for (auto& gradient : gradients) {
      gradient.zero_();
    }
    return gradients;
  }
  const Tensor x = laid_out(input, settings.padding(0));
  const Tensor g = laid_out(grad_output, {0, 0});
  const Tensor kept_activations = activations.contiguous();
  const Tensor winners = index.contiguous();
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Prepared<T> prepared(sizes, weights, {}, settings);
    // One pass makes the gradients of a weight and its bias: the second costs next to nothing.
    std::vector<Tensor> made(gradients.size());
    const auto place = [&](size_t which) {
      const Tensor& gradient = gradients[which];
      const bool direct = wanted[which] && gradient.scalar_type() == x.scalar_type();
      const bool is_bias = which > count;
      const auto sizes = is_bias ? at::IntArrayRef(weights[which - 1 - count].sizes().slice(0, 1))
                                 : which > 0 ? weights[which - 1].sizes() : input.sizes();
      made[which] = direct ? gradient
          : which == 0 && input.dim() == 4 ? at::empty(sizes, x.options(), kLayout)
                                           : at::empty(sizes, x.options());
      return made[which].mutable_data_ptr<T>();
    };
    std::vector<cpu::ChainGradients<T>> places(count, {nullptr, nullptr});
    bool any = wanted[0];
    for (size_t l = 0; l < count; ++l) {
      if (wanted[1 + l] || wanted[1 + count + l]) {
        places[l] = {place(1 + l), place(1 + count + l)};
        any = true;
      }
    }
    if (!any) {
      return;
    }
    cpu::layer_chain_backward<T>(
        prepared.layers,
        x.size(0),
        g.const_data_ptr<T>(),
        x.const_data_ptr<T>(),
        kept_activations.const_data_ptr<T>(),
        winners.const_data_ptr<uint8_t>(),
        wanted[0] ? place(0) : nullptr,
        places);
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (wanted[i] && !made[i].is_same(gradients[i])) {
        gradients[i].copy_(made[i]);
      }
    }
  });
  return gradients;
}

Forward call_forward(
    const Tensor& input, TensorList weights, const OptionalTensors& biases, const Settings& settings, bool keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lightkit::_layer_chain_forward", "")
                             .typed<decltype(forward_meta)>();
  return op.call(input, weights, biases, settings.numbers, keep);
}

// The same in differentiable operations.
Tensor reference(const Tensor& input, TensorList weights, TensorList biases, const Settings& settings) {
  Tensor x = input;
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::optional<Tensor> bias = biases[l].defined() ? std::make_optional(biases[l]) : std::nullopt;
    x = weights[l].dim() == 2 ? at::linear(x.flatten(1), weights[l], bias)
                              : at::conv2d(x, weights[l], bias, 1, settings.padding(l));
    x = settings.relu(l) ? at::relu(x) : x;
    x = settings.pool(l) ? at::max_pool2d(x, 2) : x;
  }
  return x;
}

// The gradients for backward with create_graph=True: of the reference, and differentiable. Which positions win does not
// change with the input, nearly everywhere.
std::vector<Tensor> differentiable_gradients(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    TensorList biases,
    const Settings& settings,
    at::IntArrayRef wanted) {
  // Aliases: if one of the tensors was made from another, that is none of this operation's.
  const auto alias = [](const Tensor& tensor) { return tensor.defined() ? tensor.alias() : tensor; };
  variable_list all{alias(input)};
  for (const auto tensors : {weights, biases}) {
    for (const Tensor& tensor : tensors) {
      all.push_back(alias(tensor));
    }
  }
  const TensorList aliases(all);
  const Tensor output = reference(
      aliases[0], aliases.slice(1, weights.size()), aliases.slice(1 + weights.size(), weights.size()), settings);
  variable_list inputs;
  for (size_t i = 0; i < all.size(); ++i) {
    if (wanted[i]) {
      inputs.push_back(all[i]);
    }
  }
  const auto found = torch::autograd::grad({output}, inputs, {grad_output}, std::nullopt, /*create_graph=*/true);
  std::vector<Tensor> gradients(all.size());
  for (size_t i = 0, j = 0; i < all.size(); ++i) {
    if (wanted[i]) {
      gradients[i] = found[j++];
    }
  }
  return gradients;
}

// Its variables, and what backward keeps of them, are the input, the weights and those biases that there are.
class LayerChain : public torch::autograd::Function<LayerChain> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& input,
      TensorList weights,
      TensorList present_biases,
      const OptionalTensors& biases,
      std::vector<int64_t> numbers) {
    Tensor output, activations, index;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(output, activations, index) = call_forward(input, weights, biases, {numbers}, /*keep=*/true);
    }
    variable_list saved{input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), present_biases.begin(), present_biases.end());
    saved.insert(saved.end(), {activations, index});
    ctx->save_for_backward(std::move(saved));
    std::vector<bool> is_present;
    for (const std::optional<Tensor>& bias : biases) {
      is_present.push_back(is_there(bias));
    }
    ctx->saved_data["biases"] = std::move(is_present);
    ctx->saved_data["settings"] = std::move(numbers);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    // And none for the biases as they were given and the settings.
    variable_list gradients(saved.size() - 2 + 2);
    if (!grad_outputs[0].defined()) {
      return gradients;
    }
    const auto numbers = ctx->saved_data["settings"].toIntVector();
    const auto is_present = ctx->saved_data["biases"].toBoolList();
    const size_t count = is_present.size();
    const TensorList weights = TensorList(saved).slice(1, count);
    variable_list biases(count);
    // Of each gradient as the operations have them, the variable that it is for: the input comes without wanting one.
    std::vector<size_t> variables(1 + 2 * count, 0);
    c10::SmallVector<int64_t, 16> wanted(1 + 2 * count, 0);
    size_t next = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (i <= count || is_present[i - 1 - count]) {
        variables[i] = next++;
        wanted[i] = ctx->needs_input_grad(variables[i]);
        if (i > count) {
          biases[i - 1 - count] = saved[variables[i]];
        }
      }
    }
    const auto found = at::GradMode::is_enabled()
        ? differentiable_gradients(grad_outputs[0], saved[0], weights, biases, {numbers}, wanted)
        : call_backward(grad_outputs[0], saved, weights, {numbers}, wanted);
    for (size_t i = 0; i < found.size(); ++i) {
      if (wanted[i]) {
        gradients[variables[i]] = found[i];
      }
    }
    return gradients;
  }

 private:
  static std::vector<Tensor> call_backward(
      const Tensor& grad_output,
      const variable_list& saved,
      TensorList weights,
      const Settings& settings,
      at::IntArrayRef wanted) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("lightkit::_layer_chain_backward", "")
                               .typed<decltype(backward_meta)>();
    return op.call(
        grad_output,
        saved[0],
        weights,
        saved[saved.size() - 2],
        saved[saved.size() - 1],
        settings.numbers,
        wanted);
  }
};

Tensor layer_chain(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers) {
  return std::get<0>(call_forward(input, weights, biases, {numbers}, /*keep=*/false));
}

bool needs_gradient(const Tensor& input, TensorList weights, TensorList biases) {
  const auto needs = [](const Tensor& tensor) { return tensor.requires_grad(); };
  return needs(input) || std::any_of(weights.begin(), weights.end(), needs) ||
      std::any_of(biases.begin(), biases.end(), needs);
}

Tensor layer_chain_autograd(
    const Tensor& input,
    TensorList weights,
    const OptionalTensors& biases,
    at::IntArrayRef numbers) {
  variable_list present_biases;
  for (const std::optional<Tensor>& bias : biases) {
    if (is_there(bias)) {
      present_biases.push_back(*bias);
    }
  }
  if (at::GradMode::is_enabled() && needs_gradient(input, weights, present_biases)) {
    return LayerChain::apply(input, weights, TensorList(present_biases), biases, numbers.vec());
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return layer_chain(input, weights, biases, numbers);
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
  static const auto chain = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("lightkit::layer_chain", "")
                                .typed<decltype(layer_chain)>();
  return chain.call(input, weight, OptionalTensors({bias}), {padding[0], padding[1], /*relu=*/1, pool});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
  m.def("layer_chain(Tensor input, Tensor[] weights, Tensor?[] biases, int[] settings) -> Tensor");
  m.def(
      "_layer_chain_forward(Tensor input, Tensor[] weights, Tensor?[] biases, int[] settings, bool keep) "
      "-> (Tensor output, Tensor activations, Tensor index)");
  m.def(
      "_layer_chain_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor activations, Tensor index, "
      "int[] settings, int[] wanted) -> Tensor[]");
  m.def("conv_relu_pool(Tensor input, Tensor weight, Tensor? bias, int[2] padding, bool pool) -> Tensor");
}

TORCH_LIBRARY_IMPL(lightkit, CPU, m) {
  m.impl("_layer_chain_forward", forward_cpu);
  m.impl("_layer_chain_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_layer_chain_forward", forward_meta);
  m.impl("_layer_chain_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("layer_chain", layer_chain);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("layer_chain", layer_chain_autograd);
}

TORCH_LIBRARY_IMPL(lightkit, CompositeImplicitAutograd, m) {
  m.impl("conv_relu_pool", conv_relu_pool);
}

}  // namespace lightkit
