// The shape of one layer of a chain, and how its tensors lie in memory.
#pragma once

#include "../../common/ceil_div.h"
#include "../common/simd.h"

#include <array>
#include <cstdint>

namespace lightkit::cpu::layer_chain {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline constexpr int kWidth = Vec<T>::size();

// A convolution of stride 1 without padding, then a ReLU or none, then a 2x2 max-pool of stride 2 or none. Tensors are
// dense with the channels last: [images, rows, columns, channels].
struct Shape {
  int64_t height;
  int64_t width;
  int64_t in_channels;
  int64_t out_channels;
  int64_t kernel_height;
  int64_t kernel_width;
  bool relu;
  bool pool;

  // Sizes of the output. The last row and column of an odd convolution, which the pool drops, are never computed.
  int64_t rows() const {
    return (height - kernel_height + 1) / (pool ? 2 : 1);
  }
  int64_t columns() const {
    return (width - kernel_width + 1) / (pool ? 2 : 1);
  }
  int64_t positions() const {
    return rows() * columns();
  }
  int64_t output_size() const {
    return positions() * out_channels;
  }

  // Sizes of the input.
  int64_t image_size() const {
    return height * row_size();
  }
  int64_t row_size() const {
    return width * in_channels;
  }
  // A row of the kernel reads so many consecutive inputs for one position.
  int64_t run() const {
    return kernel_width * in_channels;
  }
  int64_t kernel_size() const {
    return kernel_height * kernel_width;
  }
  // A position of the convolution sums so many products.
  int64_t taps() const {
    return kernel_size() * in_channels;
  }

  // Multiply-adds of one image.
  int64_t macs() const {
    return positions() * window() * out_channels * taps();
  }

  // A pool's window has 4 positions of the convolution; without a pool it has 1.
  int window() const {
    return pool ? 4 : 1;
  }
  // The offsets of a window's inputs from those of its first position: (0, 0), (0, 1), (1, 0), (1, 1).
  std::array<int64_t, 4> window_offsets() const {
    return {0, in_channels, row_size(), row_size() + in_channels};
  }
};

// The argmax of an output whose ReLU returned 0: no gradient flows to the output's window.
inline constexpr uint8_t kDead = 4;

// Walks over the outputs, and gives the offset of each output's first input without a division.
class OutputCursor {
 public:
  explicit OutputCursor(const Shape& shape) : shape_(shape), step_(shape.pool ? 2 : 1) {}

  // The offset of the current image.
  int64_t image_offset() const {
    return image_offset_;
  }
  int64_t offset() const {
    return image_offset_ + step_ * (row_ * shape_.row_size() + column_ * shape_.in_channels);
  }
  void advance() {
    if (++column_ == shape_.columns()) {
      column_ = 0;
      if (++row_ == shape_.rows()) {
        row_ = 0;
        image_offset_ += shape_.image_size();
      }
    }
  }

 private:
  const Shape& shape_;
  const int64_t step_;
  int64_t column_ = 0;
  int64_t row_ = 0;
  int64_t image_offset_ = 0;
};

}  // namespace lightkit::cpu::layer_chain
