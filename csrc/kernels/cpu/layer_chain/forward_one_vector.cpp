// The forward pass of a pooled kernel whose output channels fit one vector. Such a vector leaves registers free for the
// four positions of some windows, so that each input is read once for all positions of its window, and each weight once
// for all windows.

#include "forward_tile.h"

namespace lightkit::cpu::layer_chain {
namespace {

template <typename T>
using WindowSums = Vec<T>[kWindows][4];

// The weights of the kernel's rows that one row of inputs is multiplied with, each [run, width].
template <typename T>
struct WeightRows {
  const T* upper;  // for the two upper positions of a window
  const T* lower;  // for the two lower ones
};

// Adds the products of the inputs from `begin` to `end` of a row. The right positions of a window begin at input
// `in_channels` of the row, the left ones end at input `run`.
template <bool upper, bool lower, bool left, bool right, typename T>
[[gnu::always_inline]] inline void add_inputs(
    const Shape& shape,
    const T* const (&rows)[kWindows],
    const WeightRows<T>& weights,
    int64_t begin,
    int64_t end,
    WindowSums<T>& sums) {
  constexpr int width = kWidth<T>;
  constexpr bool present[4] = {upper && left, upper && right, lower && left, lower && right};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t of_left = i * width;
    const int64_t of_right = (i - shape.in_channels) * width;
    Vec<T> weight[4];
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      if (present[q]) {
        weight[q] = Vec<T>::loadu((q < 2 ? weights.upper : weights.lower) + (q % 2 == 0 ? of_left : of_right));
      }
    }
    LIGHTKIT_UNROLL
    for (int w = 0; w < kWindows; ++w) {
      const Vec<T> value(rows[w][i]);
      LIGHTKIT_UNROLL
      for (int q = 0; q < 4; ++q) {
        if (present[q]) {
          sums[w][q] = at::vec::fmadd(value, weight[q], sums[w][q]);
        }
      }
    }
  }
}

// Adds the products of a whole row of inputs.
template <bool upper, bool lower, typename T>
[[gnu::always_inline]] inline void add_row(
    const Shape& shape, const T* const (&rows)[kWindows], const WeightRows<T>& weights, WindowSums<T>& sums) {
  const int64_t run = shape.run();
  const int64_t channels = shape.in_channels;
  add_inputs<upper, lower, true, false>(shape, rows, weights, 0, channels, sums);
  add_inputs<upper, lower, true, true>(shape, rows, weights, channels, run, sums);
  add_inputs<upper, lower, false, true>(shape, rows, weights, run, run + channels, sums);
}

// Writes bias + the products of each position of each window.
template <typename T>
void convolve_windows(
    const Shape& shape,
    const T* (&rows)[kWindows],  // each [kernel_height + 1, run + in_channels], rows `row_size` apart
    const T* weight,             // [kernel_height, run, width]
    const T* bias,               // [width]
    T* results) {                // [kWindows, 4, width]
  const int64_t weight_row = shape.run() * kWidth<T>;
  WindowSums<T> sums;
  LIGHTKIT_UNROLL
  for (int w = 0; w < kWindows; ++w) {
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      sums[w][q] = Vec<T>::loadu(bias);
    }
  }
  const auto advance = [&] {
    LIGHTKIT_UNROLL
    for (int w = 0; w < kWindows; ++w) {
      rows[w] += shape.row_size();
    }
  };
  WeightRows<T> weights{weight, nullptr};
  add_row<true, false>(shape, rows, weights, sums);
  for (int64_t row = 1; row < shape.kernel_height; ++row) {
    advance();
    weights = {weight + row * weight_row, weight + (row - 1) * weight_row};
    add_row<true, true>(shape, rows, weights, sums);
  }
  advance();
  weights = {nullptr, weight + (shape.kernel_height - 1) * weight_row};
  add_row<false, true>(shape, rows, weights, sums);
  LIGHTKIT_UNROLL
  for (int w = 0; w < kWindows; ++w) {
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      sums[w][q].store(results + (w * 4 + q) * kWidth<T>);
    }
  }
}

}  // namespace

template <typename T>
void ForwardKernel<T>::run_one_vector(int64_t images, const T* input, T* output, uint8_t* argmax) const {
  constexpr int width = kWidth<T>;
  const int64_t channels = shape_.out_channels;
  const int64_t total = images * shape_.positions();
  OutputCursor cursor(shape_);
  for (int64_t first = 0; first < total; first += kWindows) {
    const int64_t count = std::min<int64_t>(kWindows, total - first);
    const T* rows[kWindows];
    for (int64_t w = 0; w < count; ++w, cursor.advance()) {
      rows[w] = input + cursor.offset();
    }
    // The windows that fill the last tile repeat the first one; their sums are not read.
    std::fill(rows + count, rows + kWindows, rows[0]);
    alignas(64) T sums[kWindows * 4 * width];
    convolve_windows<T>(shape_, rows, packed_.data(), packed_bias_.data(), sums);
    for (int64_t w = 0; w < count; ++w) {
      const int64_t at = (first + w) * channels;
      finish<T, 4>(
          sums + w * 4 * width, width, shape_.relu, output + at, argmax == nullptr ? nullptr : argmax + at, channels);
    }
  }
}

template void ForwardKernel<float>::run_one_vector(int64_t, const float*, float*, uint8_t*) const;
template void ForwardKernel<double>::run_one_vector(int64_t, const double*, double*, uint8_t*) const;

}  // namespace lightkit::cpu::layer_chain
