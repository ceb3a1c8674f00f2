// The forward pass of a pooled kernel whose output channels fit one vector. Such a vector leaves registers free for the
// four positions of some windows, so that each input is read once for all positions of its window, and each weight once
// for all windows.
//
// Channels that fit half a vector leave the other half to the next window of the row: the inputs of two windows are
// laid side by side first, once for all rows of the kernel that read them.

#include "forward_tile.h"

namespace lightkit::cpu::layer_chain {
namespace {

template <typename T, int windows>
using WindowSums = Vec<T>[windows][4];

// The weights of the kernel's rows that one row of inputs is multiplied with, each [run, width].
template <typename T>
struct WeightRows {
  const T* upper;  // for the two upper positions of a window
  const T* lower;  // for the two lower ones
};

// Inputs of which each is multiplied with all lanes: `stride` is 1. Or inputs that are vectors: `stride` is their
// width.
template <typename T, int stride>
Vec<T> load_input(const T* row, int64_t i) {
  if constexpr (stride == 1) {
    return Vec<T>(row[i]);
  } else {
    return Vec<T>::loadu(row + i * stride);
  }
}

// Adds the products of the inputs from `begin` to `end` of a row. The right positions of a window begin at input
// `in_channels` of the row, the left ones end at input `run`.
template <int stride, bool upper, bool lower, bool left, bool right, int windows, typename T>
[[gnu::always_inline]] inline void add_inputs(
    const Shape& shape,
    const T* const (&rows)[windows],
    const WeightRows<T>& weights,
    int64_t begin,
    int64_t end,
    WindowSums<T, windows>& sums) {
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
    for (int w = 0; w < windows; ++w) {
      const Vec<T> value = load_input<T, stride>(rows[w], i);
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
template <int stride, bool upper, bool lower, int windows, typename T>
[[gnu::always_inline]] inline void add_row(
    const Shape& shape, const T* const (&rows)[windows], const WeightRows<T>& weights, WindowSums<T, windows>& sums) {
  const int64_t run = shape.run();
  const int64_t channels = shape.in_channels;
  add_inputs<stride, upper, lower, true, false>(shape, rows, weights, 0, channels, sums);
  add_inputs<stride, upper, lower, true, true>(shape, rows, weights, channels, run, sums);
  add_inputs<stride, upper, lower, false, true>(shape, rows, weights, run, run + channels, sums);
}

// Writes bias + the products of each position of each window. `find_row(r, rows)` sets rows[w] to the inputs of window
// w in row r of the kernel, each [run + in_channels]; the last row is kernel_height.
template <int stride, int windows, typename T, typename FindRow>
void convolve_windows(
    const Shape& shape,
    const FindRow& find_row,
    const T* weight,  // [kernel_height, run, width]
    const T* bias,    // [width]
    T* results) {     // [windows, 4, width]
  const int64_t weight_row = shape.run() * kWidth<T>;
  WindowSums<T, windows> sums;
  LIGHTKIT_UNROLL
  for (int w = 0; w < windows; ++w) {
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      sums[w][q] = Vec<T>::loadu(bias);
    }
  }
  const T* rows[windows];
  find_row(0, rows);
  add_row<stride, true, false>(shape, rows, WeightRows<T>{weight, nullptr}, sums);
  for (int64_t row = 1; row < shape.kernel_height; ++row) {
    find_row(row, rows);
    const WeightRows<T> weights{weight + row * weight_row, weight + (row - 1) * weight_row};
    add_row<stride, true, true>(shape, rows, weights, sums);
  }
  find_row(shape.kernel_height, rows);
  const WeightRows<T> weights{nullptr, weight + (shape.kernel_height - 1) * weight_row};
  add_row<stride, false, true>(shape, rows, weights, sums);
  LIGHTKIT_UNROLL
  for (int w = 0; w < windows; ++w) {
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      sums[w][q].store(results + (w * 4 + q) * kWidth<T>);
    }
  }
}

// Writes each input of a row beside that of the next window, 2 * in_channels further, each as often as half a vector.
template <typename T>
void pair_inputs(const Shape& shape, const T* row, T* pairs) {  // [row_size], [row_size - 2 * in_channels, width]
  constexpr int half = kWidth<T> / 2;
  constexpr int64_t upper_half = ((int64_t(1) << half) - 1) << half;
  const int64_t next = 2 * shape.in_channels;
  for (int64_t i = 0; i < shape.row_size() - next; ++i) {
    Vec<T>::template blend<upper_half>(Vec<T>(row[i]), Vec<T>(row[i + next])).store(pairs + i * kWidth<T>);
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
    const auto find_row = [&](int64_t row, const T*(&found)[kWindows]) {
      LIGHTKIT_UNROLL
      for (int w = 0; w < kWindows; ++w) {
        found[w] = rows[w] + row * shape_.row_size();
      }
    };
    alignas(64) T sums[kWindows * 4 * width];
    convolve_windows<1, kWindows>(shape_, find_row, packed_.data(), packed_bias_.data(), sums);
    for (int64_t w = 0; w < count; ++w) {
      const int64_t at = (first + w) * channels;
      finish<T, 4>(
          sums + w * 4 * width, width, shape_.relu, output + at, argmax == nullptr ? nullptr : argmax + at, channels);
    }
  }
}

template <typename T>
void ForwardKernel<T>::run_half_vector(int64_t images, const T* input, T* output, uint8_t* argmax) const {
  constexpr int width = kWidth<T>;
  const int64_t channels = shape_.out_channels;
  const int64_t columns = shape_.columns();
  const int64_t pairs = ceil_div(columns, 2);
  // The rows of the kernel and the one below it, in a ring: input row r lies in place r % depth.
  const int64_t depth = shape_.kernel_height + 1;
  const int64_t row_size = (shape_.row_size() - 2 * shape_.in_channels) * width;
  AlignedBuffer<T> ring(depth * row_size);
  for (int64_t image = 0; image < images; ++image, input += shape_.image_size()) {
    int64_t paired = 0;
    for (int64_t row = 0; row < shape_.rows(); ++row) {
      for (; paired < 2 * row + depth; ++paired) {
        pair_inputs<T>(shape_, input + paired * shape_.row_size(), ring.data() + paired % depth * row_size);
      }
      for (int64_t first = 0; first < pairs; first += kPairs) {
        // The left window of each pair. The last pair of an odd row, and those that fill the last tile, repeat windows.
        int64_t column[kPairs];
        for (int w = 0; w < kPairs; ++w) {
          column[w] = std::min(2 * (first + w), columns - 2);
        }
        const auto find_row = [&](int64_t r, const T*(&found)[kPairs]) {
          const T* const start = ring.data() + (2 * row + r) % depth * row_size;
          LIGHTKIT_UNROLL
          for (int w = 0; w < kPairs; ++w) {
            found[w] = start + 2 * column[w] * shape_.in_channels * width;
          }
        };
        // `finish` reads whole vectors from the middle of the last one.
        alignas(64) T sums[(kPairs * 4 + 1) * width];
        convolve_windows<width, kPairs>(shape_, find_row, packed_.data(), packed_bias_.data(), sums);
        for (int64_t w = 0; w < std::min<int64_t>(kPairs, pairs - first); ++w) {
          for (int64_t side = 0; side < 2; ++side) {
            const int64_t at = ((image * shape_.rows() + row) * columns + column[w] + side) * channels;
            finish<T, 4>(
                sums + w * 4 * width + side * width / 2,
                width,
                shape_.relu,
                output + at,
                argmax == nullptr ? nullptr : argmax + at,
                channels);
          }
        }
      }
    }
  }
}

#define LIGHTKIT_INSTANTIATE(T)                                                          \
  template void ForwardKernel<T>::run_one_vector(int64_t, const T*, T*, uint8_t*) const; \
  template void ForwardKernel<T>::run_half_vector(int64_t, const T*, T*, uint8_t*) const;

LIGHTKIT_INSTANTIATE(float)
LIGHTKIT_INSTANTIATE(double)
#undef LIGHTKIT_INSTANTIATE

}  // namespace lightkit::cpu::layer_chain
