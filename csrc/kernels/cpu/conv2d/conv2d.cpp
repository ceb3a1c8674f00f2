#include "conv2d.h"

#include "../common/winograd.h"
#include "kernels.h"
#include "tile_cursor.h"

namespace lightkit::cpu::conv2d {
namespace {

// The algorithms. tuning.h has the limits between them.
enum class Algorithm : uint8_t { Direct, Rows, Tiles };

template <typename T>
Algorithm choose(const Correlation& c, bool of_weight) {
  if (c.row_step != 1 || c.column_step != 1 || !TileGrid::fits(c) || c.in_channels < kMinWinogradChannels) {
    return Algorithm::Direct;
  }
  const int64_t lanes = round_up(c.out_channels, kWidth<T>);
  const bool is_whole = c.in_channels % kWidth<T> == 0;
  if (is_whole && lanes > kMaxRowVectorsOfWholeInputs * kWidth<T>) {
    const int64_t bytes = lanes * c.in_channels * winograd::kPoints * static_cast<int64_t>(sizeof(T));
    return bytes <= kMaxWinogradBytes ? Algorithm::Tiles : Algorithm::Direct;
  }
  // The direct gradient of a weight is as fast as that of rows if there are more vectors.
  return !of_weight || lanes <= kMaxRowVectorsOfWholeInputs * kWidth<T> ? Algorithm::Rows : Algorithm::Direct;
}

template <typename T>
void correlate(const Shape& shape, const CorrelationProblem<T>& problem) {
  if (shape.is_depthwise()) {
    return correlate_depthwise(problem);
  }
  switch (choose<T>(problem.correlation, /*of_weight=*/false)) {
    case Algorithm::Direct:
      return correlate_directly(problem);
    case Algorithm::Rows:
      return correlate_by_row_winograd(problem);
    case Algorithm::Tiles:
      return correlate_by_winograd(problem);
  }
}

template <typename T>
void add_up_grad_weight(const Shape& shape, const GradWeightProblem<T>& problem) {
  if (shape.is_depthwise()) {
    return grad_weight_depthwise(problem);
  }
  const Algorithm algorithm = choose<T>(problem.correlation, /*of_weight=*/true);
  if (problem.grad_weight == nullptr || algorithm == Algorithm::Direct) {
    grad_weight_directly(problem);
  } else if (algorithm == Algorithm::Rows) {
    grad_weight_by_rows(problem);
  } else {
    grad_weight_by_winograd(problem);
  }
}

}  // namespace

template <typename T>
void forward(
    const Shape& shape, const Images<const T>& input, const T* weight, const T* bias, T* output, T* mean, T* variance) {
  const Correlation correlation = forward_correlation(shape);
  const int64_t groups = shape.is_depthwise() ? 1 : shape.groups;
  const Images<T> results = channels_last(output, correlation.rows, correlation.columns, shape.out_channels);
  const int64_t taps = shape.kernel_size();
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t out = group * shape.group_out();
    Moments moments(correlation.out_channels);
    correlate<T>(
        shape,
        {.correlation = correlation,
         .source = input.from_channel(group * shape.group_in()),
         .weights = {weight + out * shape.group_in() * taps, shape.group_in() * taps, taps, 1},
         .bias = bias == nullptr ? nullptr : bias + out,
         .results = results.from_channel(out),
         .moments = mean == nullptr ? nullptr : &moments});
    if (mean != nullptr) {
      moments.write(mean + out, variance + out);
    }
  }
}

template <typename T>
void grad_input(const Shape& shape, const T* grad_output, const T* weight, T* grad_input) {
  const int64_t taps = shape.kernel_size();
  const int64_t groups = shape.is_depthwise() ? 1 : shape.groups;
  const auto source = channels_last(grad_output, shape.rows.outputs(), shape.columns.outputs(), shape.out_channels);
  const auto whole = channels_last(grad_input, shape.rows.size, shape.columns.size, shape.in_channels);
  for (int64_t row = 0; row < std::min(shape.rows.stride, shape.rows.size); ++row) {
    for (int64_t column = 0; column < std::min(shape.columns.stride, shape.columns.size); ++column) {
      const Correlation correlation = grad_input_correlation(shape, row, column);
      // Every stride-th input.
      const Images<T> results{
          whole.at(0, row, column), whole.image, whole.row * shape.rows.stride, whole.column * shape.columns.stride, 1};
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t out = group * shape.group_out();
        correlate<T>(
            shape,
            {.correlation = correlation,
             .source = source.from_channel(out),
             .weights = {weight + out * shape.group_in() * taps, taps, shape.group_in() * taps, 1},
             .bias = nullptr,
             .results = results.from_channel(group * shape.group_in()),
             .moments = nullptr});
      }
    }
  }
}

template <typename T>
void grad_weight(const Shape& shape, const Images<const T>& input, const T* grad_output, T* grad_weight, T* grad_bias) {
  const Correlation correlation = forward_correlation(shape);
  const int64_t groups = shape.is_depthwise() ? 1 : shape.groups;
  const Images<const T> gradient =
      channels_last(grad_output, correlation.rows, correlation.columns, shape.out_channels);
  if (grad_weight != nullptr && static_cast<int64_t>(correlation.taps.size()) < shape.kernel_size()) {
    std::fill_n(grad_weight, shape.out_channels * shape.group_in() * shape.kernel_size(), T(0));
  }
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t out = group * shape.group_out();
    add_up_grad_weight<T>(
        shape,
        {.correlation = correlation,
         .input = input.from_channel(group * shape.group_in()),
         .grad_output = gradient.from_channel(out),
         .kernel_size = shape.kernel_size(),
         .grad_weight = grad_weight == nullptr ? nullptr : grad_weight + out * shape.group_in() * shape.kernel_size(),
         .grad_bias = grad_bias == nullptr ? nullptr : grad_bias + out});
  }
}

#define LIGHTKIT_INSTANTIATE(T)                                                                \
  template void forward(const Shape&, const Images<const T>&, const T*, const T*, T*, T*, T*); \
  template void grad_input(const Shape&, const T*, const T*, T*);                              \
  template void grad_weight(const Shape&, const Images<const T>&, const T*, T*, T*);

LIGHTKIT_INSTANTIATE(float)
LIGHTKIT_INSTANTIATE(double)
#undef LIGHTKIT_INSTANTIATE

}  // namespace lightkit::cpu::conv2d
