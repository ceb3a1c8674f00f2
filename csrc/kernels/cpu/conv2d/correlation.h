// A convolution as a sum over taps: the common form of the forward pass and of the gradient of the input.
#pragma once

#include "shape.h"

#include <vector>

namespace lightkit::cpu::conv2d {

// A tap reads the source `row` rows and `column` columns away from a result's place in it. `index` is the tap's place
// in the kernel.
struct Tap {
  int64_t row;
  int64_t column;
  int64_t index;
};

// result[n, y, x, o] = sum over taps t and channels i of
//     source[n, y * row_step + t.row, x * column_step + t.column, i] * weight[o, i, t.index],
// where the source is 0 outside of its rows and columns.
struct Correlation {
  int64_t images;
  int64_t in_channels;
  int64_t out_channels;
  int64_t source_rows;
  int64_t source_columns;
  int64_t rows;
  int64_t columns;
  int64_t row_step;
  int64_t column_step;
  std::vector<Tap> taps;

  // Multiply-adds of all images.
  int64_t macs() const {
    return images * rows * columns * static_cast<int64_t>(taps.size()) * in_channels * out_channels;
  }
};

// Drops the taps that read nothing but zeros around the source.
inline void drop_dead_taps(Correlation& c) {
  const auto is_dead = [](int64_t offset, int64_t step, int64_t results, int64_t size) {
    // The first result that reads at 0 or above.
    const int64_t first = offset >= 0 ? 0 : ceil_div(-offset, step);
    return first >= results || first * step + offset >= size;
  };
  std::erase_if(c.taps, [&](const Tap& tap) {
    return is_dead(tap.row, c.row_step, c.rows, c.source_rows) ||
        is_dead(tap.column, c.column_step, c.columns, c.source_columns);
  });
}

// Weights in memory, with the strides of output channels, input channels and taps in elements.
template <typename T>
struct Weights {
  const T* data;
  int64_t out;
  int64_t in;
  int64_t tap;

  T at(int64_t o, int64_t i, int64_t t) const {
    return data[o * out + i * in + t * tap];
  }
};

// The channels of one group. The groups of a depthwise convolution are computed at once.
inline int64_t channels_at_once(const Shape& shape, int64_t of_group) {
  return shape.is_depthwise() ? shape.in_channels : of_group;
}

// The forward pass of one group, or of all groups of a depthwise convolution.
inline Correlation forward_correlation(const Shape& shape) {
  const Axis& rows = shape.rows;
  const Axis& columns = shape.columns;
  Correlation c{
      .images = shape.images,
      .in_channels = channels_at_once(shape, shape.group_in()),
      .out_channels = channels_at_once(shape, shape.group_out()),
      .source_rows = rows.size,
      .source_columns = columns.size,
      .rows = rows.outputs(),
      .columns = columns.outputs(),
      .row_step = rows.stride,
      .column_step = columns.stride,
      .taps = {},
  };
  for (int64_t ky = 0; ky < rows.kernel; ++ky) {
    for (int64_t kx = 0; kx < columns.kernel; ++kx) {
      c.taps.push_back(
          {ky * rows.dilation - rows.padding, kx * columns.dilation - columns.padding, ky * columns.kernel + kx});
    }
  }
  drop_dead_taps(c);
  return c;
}

// The gradient of the inputs of the same channels whose row and column leave the rests `row` and `column` when divided
// by the strides. The source is the gradient of the output, and the results are every stride-th input.
inline Correlation grad_input_correlation(const Shape& shape, int64_t row, int64_t column) {
  const Axis& rows = shape.rows;
  const Axis& columns = shape.columns;
  Correlation c{
      .images = shape.images,
      .in_channels = channels_at_once(shape, shape.group_out()),
      .out_channels = channels_at_once(shape, shape.group_in()),
      .source_rows = rows.outputs(),
      .source_columns = columns.outputs(),
      .rows = ceil_div(rows.size - row, rows.stride),
      .columns = ceil_div(columns.size - column, columns.stride),
      .row_step = 1,
      .column_step = 1,
      .taps = {},
  };
  // The last tap of the kernel comes first, so that the taps are in the order of the source.
  for (int64_t ky = rows.kernel - 1; ky >= 0; --ky) {
    const int64_t y = row + rows.padding - ky * rows.dilation;
    for (int64_t kx = columns.kernel - 1; kx >= 0; --kx) {
      const int64_t x = column + columns.padding - kx * columns.dilation;
      if (y % rows.stride == 0 && x % columns.stride == 0) {
        c.taps.push_back({y / rows.stride, x / columns.stride, ky * columns.kernel + kx});
      }
    }
  }
  drop_dead_taps(c);
  return c;
}

}  // namespace lightkit::cpu::conv2d
