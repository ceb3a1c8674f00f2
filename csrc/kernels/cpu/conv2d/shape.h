// The shape of a convolution, and how its tensors lie in memory.
#pragma once

#include "../../common/ceil_div.h"
#include "../common/simd.h"

#include <cstdint>

namespace lightkit::cpu::conv2d {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline constexpr int kWidth = Vec<T>::size();

// The rows, or the columns, of a convolution.
struct Axis {
  int64_t size;  // of the input
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  // The size of the output.
  int64_t outputs() const {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
};

struct Shape {
  int64_t images;
  int64_t in_channels;   // of all groups
  int64_t out_channels;  // of all groups
  int64_t groups;
  Axis rows;
  Axis columns;

  int64_t kernel_size() const {
    return rows.kernel * columns.kernel;
  }
  int64_t group_in() const {
    return in_channels / groups;
  }
  int64_t group_out() const {
    return out_channels / groups;
  }
  // A group per channel: no sum over channels.
  bool is_depthwise() const {
    return groups > 1 && groups == in_channels && groups == out_channels;
  }
};

// Images in memory, [images, rows, columns, channels], with the strides of each dimension in elements.
template <typename T>
struct Images {
  T* data;
  int64_t image;
  int64_t row;
  int64_t column;
  int64_t channel;

  T* at(int64_t n, int64_t y, int64_t x) const {
    return data + n * image + y * row + x * column;
  }
  Images from_channel(int64_t c) const {
    return {data + c * channel, image, row, column, channel};
  }
};

// Rows of an image's results.
struct Band {
  int64_t image;
  int64_t row;  // the first one
  int64_t rows;
};

// Dense images with the channels last.
template <typename T>
Images<T> channels_last(T* data, int64_t rows, int64_t columns, int64_t channels) {
  return {data, rows * columns * channels, columns * channels, channels, 1};
}

}  // namespace lightkit::cpu::conv2d
