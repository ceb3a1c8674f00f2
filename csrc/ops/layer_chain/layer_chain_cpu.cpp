// lightkit::layer_chain on a CPU: layout, memory, and the kernels.

#include "../../kernels/cpu/layer_chain/channels_last.h"
#include "../../kernels/cpu/layer_chain/layer_chain.h"
#include "layer_chain.h"

namespace lightkit {
namespace {

using at::Tensor;
using at::TensorList;

// Calls f(scalar_t()) with the type that the kernels compute in.
template <typename F>
void with_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

// Returns a padded copy, channels last, of a contiguous tensor of few channels. torch's copy is several times slower.
Tensor laid_out_few_channels(const Tensor& tensor, at::IntArrayRef padding) {
  const int64_t rows = tensor.size(2);
  const int64_t columns = tensor.size(3);
  const Tensor result = empty(
      {tensor.size(0), tensor.size(1), rows + 2 * padding[0], columns + 2 * padding[1]},
      tensor.options().memory_format(kChainLayout));
  with_type(tensor, [&](auto zero) {
    using T = decltype(zero);
    cpu::layer_chain::to_channels_last<T>(
        {tensor.size(0), tensor.size(1), rows, columns},
        {padding[0], padding[1]},
        tensor.const_data_ptr<T>(),
        result.mutable_data_ptr<T>());
  });
  return result;
}

// Returns a padded tensor, channels last, in the dtype of the computation: the kernels pad only between layers, and
// have no half precision.
Tensor laid_out(const Tensor& tensor, at::IntArrayRef padding) {
  Tensor result = tensor.to(compute_type(tensor.scalar_type()));
  if (tensor.dim() == 2) {
    return result.contiguous();
  }
  const int64_t channels = result.size(1);
  if (channels > 1 && channels <= cpu::layer_chain::kMaxFewChannels && result.is_contiguous()) {
    return laid_out_few_channels(result, padding);
  }
  if (padding[0] != 0 || padding[1] != 0) {
    result = pad_with_zeros(result, {padding[1], padding[1], padding[0], padding[0]});
  }
  return result.contiguous(kChainLayout);
}

void check_memory_of_layers(TensorList weights, OptionalTensors biases) {
  for (const Tensor& weight : weights) {
    check_memory("layer_chain", "a weight", weight);
  }
  for (const auto& bias : biases) {
    check_memory("layer_chain", "a bias", bias);
  }
}

// The kernels' arguments of a chain, and the tensors that own their memory.
template <typename T>
struct Prepared {
  std::vector<cpu::layer_chain::Layer<T>> layers;
  std::vector<Tensor> held;

  Prepared(const std::vector<LayerSizes>& sizes, TensorList weights, OptionalTensors biases, const Settings& settings) {
    const auto hold = [&](const Tensor& tensor) {
      // Tensors of a list may have a pending negation.
      held.push_back(tensor.resolve_neg().to(c10::CppTypeToScalarType<T>::value).contiguous());
      return held.back().template const_data_ptr<T>();
    };
    for (size_t l = 0; l < sizes.size(); ++l) {
      const auto number = [](const c10::SymInt& size) { return size.expect_int(); };
      const auto& s = sizes[l];
      const std::array<int64_t, 2> padding{settings.padding(l)[0], settings.padding(l)[1]};
      const cpu::layer_chain::Shape shape{
          .height = number(s.height) + 2 * padding[0],
          .width = number(s.width) + 2 * padding[1],
          .in_channels = number(s.channels),
          .out_channels = number(s.out_channels),
          .kernel_height = number(s.kernel_height),
          .kernel_width = number(s.kernel_width),
          .relu = settings.relu(l),
          .pool = settings.pool(l),
      };
      const bool biased = l < biases.size() && is_there(biases[l]);
      layers.push_back({
          .shape = shape,
          .padding = padding,
          .weight = hold(weights[l]),
          .bias = biased ? hold(*biases[l]) : nullptr,
          .output_scale = static_cast<float>(settings.scale(l)),
      });
    }
  }
};

}  // namespace

ChainResults chain_forward_cpu(
    const Tensor& input,
    TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef numbers,
    bool keep,
    at::ArrayRef<double> scales) {
  const Settings settings{numbers, scales};
  const auto sizes = check_chain(input, weights, biases, settings);
  check_memory("layer_chain", "the input", input);
  check_memory_of_layers(weights, biases);
  const ChainResults results = allocate_results(input, sizes, settings, keep);
  const Tensor& result = std::get<0>(results);
  if (result.numel() == 0) {
    return results;
  }
  const Tensor x = laid_out(input, settings.padding(0));
  // Half-precision results are rounded once.
  const Tensor output = result.scalar_type() == x.scalar_type() ? result : empty_like(result, x.options());
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Prepared<T> prepared(sizes, weights, biases, settings);
    cpu::layer_chain::forward<T>(
        prepared.layers,
        x.size(0),
        x.const_data_ptr<T>(),
        output.mutable_data_ptr<T>(),
        keep ? std::get<1>(results).mutable_data_ptr<T>() : nullptr,
        keep ? std::get<2>(results).mutable_data_ptr<uint8_t>() : nullptr);
  });
  if (!output.is_same(result)) {
    result.copy_(output);
  }
  return results;
}

std::vector<Tensor> chain_backward_cpu(
    const Tensor& grad_output,
    const Tensor& input,
    TensorList weights,
    const Tensor& activations,
    const Tensor& argmax,
    at::IntArrayRef numbers,
    at::IntArrayRef wanted) {
  const Settings settings{numbers};
  const size_t count = weights.size();
  const auto sizes = check_backward(grad_output, input, weights, activations, argmax, settings, wanted);
  check_memory("layer_chain", "the gradient", grad_output);
  check_memory("layer_chain", "the input", input);
  check_memory_of_layers(weights, {});
  check_memory("layer_chain", "activations", activations);
  check_memory("layer_chain", "argmax", argmax);
  auto gradients = allocate_gradients(input, weights, wanted);
  if (grad_output.numel() == 0) {
    for (auto& gradient : gradients) {
      gradient.zero_();
    }
    return gradients;
  }
  const Tensor x = laid_out(input, settings.padding(0));
  const Tensor g = laid_out(grad_output, {0, 0});
  const Tensor kept_activations = activations.contiguous();
  const Tensor kept_argmax = argmax.contiguous();
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Prepared<T> prepared(sizes, weights, {}, settings);
    // The kernels write to the result, or to a new tensor if the result has another dtype or is not wanted. One pass
    // computes the gradients of a weight and its bias, so that the second is nearly free.
    std::vector<Tensor> made(gradients.size());
    const auto unlike = [&](size_t which) {
      if (which == 0) {
        return empty_like(input, x.options(), input.dim() == 4 ? kChainLayout : at::MemoryFormat::Contiguous);
      }
      const bool is_bias = which > count;
      const auto sizes = weights[which - 1 - (is_bias ? count : 0)].sizes();
      return empty(is_bias ? sizes.slice(0, 1) : sizes, x.options());
    };
    const auto place = [&](size_t which) {
      const bool direct = wanted[which] && gradients[which].scalar_type() == x.scalar_type();
      made[which] = direct ? gradients[which] : unlike(which);
      return made[which].template mutable_data_ptr<T>();
    };
    std::vector<cpu::layer_chain::LayerGradients<T>> places(count, {nullptr, nullptr});
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
    cpu::layer_chain::backward<T>(
        prepared.layers,
        x.size(0),
        g.const_data_ptr<T>(),
        x.const_data_ptr<T>(),
        kept_activations.const_data_ptr<T>(),
        kept_argmax.const_data_ptr<uint8_t>(),
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

}  // namespace lightkit
