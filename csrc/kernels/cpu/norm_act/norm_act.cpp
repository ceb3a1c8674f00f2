// The order of the passes, and the arithmetic on one value a channel between them.

#include "norm_act.h"

#include "../common/aligned_buffer.h"
#include "passes.h"

#include <algorithm>
#include <cmath>

namespace lightkit::cpu::norm_act {

template <typename T>
void forward(const ForwardProblem<T>& p) {
  const int64_t channels = p.shape.channels;
  AlignedBuffer<double> moments(2 * channels);
  double* const mean = moments.data();
  double* const variance = mean + channels;
  if (p.training && p.statistics == nullptr) {
    statistics(p.shape, p.input, mean, variance);
  } else {
    const T* const given_mean = p.training ? p.statistics : p.running_mean;
    const T* const given_variance = p.training ? p.statistics + channels : p.running_var;
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = given_mean[c];
      variance[c] = given_variance[c];
    }
  }
  AlignedBuffer<T> affine(2 * channels);
  T* const scale = affine.data();
  T* const shift = scale + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1 / std::sqrt(variance[c] + p.eps);
    const double weight = p.weight == nullptr ? 1 : static_cast<double>(p.weight[c]);
    const double bias = p.bias == nullptr ? 0 : static_cast<double>(p.bias[c]);
    scale[c] = static_cast<T>(weight * inverse);
    // The product is of the rounded scale: the pass multiplies with that.
    shift[c] = static_cast<T>(bias - mean[c] * scale[c]);
    p.kept[c] = static_cast<T>(mean[c]);
    p.kept[channels + c] = static_cast<T>(inverse);
  }
  if (p.training && p.running_mean != nullptr) {
    const auto rows = static_cast<double>(p.shape.rows());
    const double unbiased = rows / (rows - 1);
    for (int64_t c = 0; c < channels; ++c) {
      p.running_mean[c] = static_cast<T>((1 - p.momentum) * p.running_mean[c] + p.momentum * mean[c]);
      p.running_var[c] = static_cast<T>((1 - p.momentum) * p.running_var[c] + p.momentum * variance[c] * unbiased);
    }
  }
  normalize<T>({
      .shape = p.shape,
      .input = p.input,
      .residual = p.residual,
      .scale = scale,
      .shift = shift,
      .output = p.output,
      .live = p.live,
  });
}

namespace {

// Computes the gradients of a normalization with a ReLU or no function behind it.
//
// With g the gradient of the normalized input, x^ = (input - mean) * inverse and n rows:
//   grad_bias = sum(g), grad_weight = sum(g * x^),
//   grad_input = weight * inverse * (g - grad_bias / n - x^ * grad_weight / n).
// Without training mean and variance are constants: the last two terms are 0.
template <typename T>
void linear_backward(const BackwardProblem<T>& p) {
  const int64_t channels = p.shape.channels;
  const T* const mean = p.kept;
  const T* const inverse = p.kept + channels;
  const Gradient<T> gradient{.shape = p.shape, .grad_output = p.grad_output, .live = p.live};
  const bool centered = p.training && p.grad_input != nullptr;
  AlignedBuffer<double> sums(2 * channels);
  double* const sum = sums.data();
  double* const dot = sum + channels;
  if (centered || p.grad_weight != nullptr) {
    gradient_sums(gradient, p.input, mean, sum, dot);
  }
  if (p.grad_weight != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      p.grad_bias[c] = static_cast<T>(sum[c]);
      p.grad_weight[c] = static_cast<T>(dot[c] * inverse[c]);
    }
  }
  if (p.grad_input == nullptr && p.grad_residual == nullptr) {
    return;
  }
  AlignedBuffer<T> coefficients(3 * channels);
  T* const scale = coefficients.data();
  T* const slope = scale + channels;
  T* const offset = slope + channels;
  const auto rows = static_cast<double>(p.shape.rows());
  for (int64_t c = 0; c < channels; ++c) {
    const double factor = (p.weight == nullptr ? 1 : static_cast<double>(p.weight[c])) * inverse[c];
    scale[c] = static_cast<T>(factor);
    if (centered) {
      // Of the rounded scale: the sum of the gradients of a channel is 0.
      slope[c] = static_cast<T>(-static_cast<double>(scale[c]) * inverse[c] * inverse[c] * dot[c] / rows);
      offset[c] = static_cast<T>(-static_cast<double>(scale[c]) * sum[c] / rows);
    }
  }
  write_gradients<T>(
      gradient,
      {
          .input = p.input,
          .scale = scale,
          .mean = mean,
          .slope = centered ? slope : nullptr,
          .offset = offset,
          .grad_input = p.grad_input,
          .grad_residual = p.grad_residual,
      });
}

// Computes the gradients with a general activation function.
template <typename T>
void general_backward(const BackwardProblem<T>& p) {
  const int64_t channels = p.shape.channels;
  AlignedBuffer<T> affine(2 * channels);
  T* const scale = affine.data();
  T* const shift = scale + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double weight = p.weight == nullptr ? 1 : static_cast<double>(p.weight[c]);
    const double bias = p.bias == nullptr ? 0 : static_cast<double>(p.bias[c]);
    scale[c] = static_cast<T>(weight * p.kept[channels + c]);
    shift[c] = static_cast<T>(bias - static_cast<double>(p.kept[c]) * scale[c]);
  }
  // Without a max-pool the gradient of the values before the function takes the memory of a result.
  const bool is_max = p.shape.is_max();
  T* const result = is_max ? nullptr : p.grad_residual != nullptr ? p.grad_residual : p.grad_input;
  AlignedBuffer<T> own(result == nullptr ? p.shape.gradient_rows() * channels : 0);
  T* const g = result == nullptr ? own.data() : result;
  differentiate_rows<T>({
      .forward =
          {.shape = p.shape,
           .input = p.input,
           .residual = p.residual,
           .scale = scale,
           .shift = shift,
           .output = g,
           .live = nullptr},
      .live = p.live,
      .grad_output = p.grad_output,
  });
  BackwardProblem<T> rest = p;
  rest.shape.activation.kind = Kind::None;
  rest.grad_output = g;
  if (!is_max) {
    rest.shape.pool = Pool::None;
    rest.live = nullptr;
    rest.grad_residual = nullptr;
    const bool is_identity = !p.training && std::all_of(scale, scale + channels, [](T s) { return s == 1; });
    if (is_identity && g == p.grad_input) {
      rest.grad_input = nullptr;
    }
  }
  linear_backward(rest);
}

}  // namespace

template <typename T>
void backward(const BackwardProblem<T>& p) {
  const auto run = p.shape.activation.is_general() ? general_backward<T> : linear_backward<T>;
  if (!p.shape.is_mean()) {
    run(p);
    return;
  }
  const int64_t count = p.shape.images * p.shape.channels;
  AlignedBuffer<T> shares(count);
  const auto rows = static_cast<T>(p.shape.image_rows());
  std::transform(p.grad_output, p.grad_output + count, shares.data(), [rows](T g) { return g / rows; });
  BackwardProblem<T> of_shares = p;
  of_shares.grad_output = shares.data();
  run(of_shares);
}

template void forward(const ForwardProblem<float>&);
template void forward(const ForwardProblem<double>&);
template void backward(const BackwardProblem<float>&);
template void backward(const BackwardProblem<double>&);

}  // namespace lightkit::cpu::norm_act
