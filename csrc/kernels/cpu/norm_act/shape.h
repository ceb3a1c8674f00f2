// The shapes of a normalization, and how its tensors lie in memory.
#pragma once

#include "activation.h"

#include <cstdint>

namespace lightkit::cpu::norm_act {

// A normalization of each channel, then an activation function or none, then a 2x2 max-pool of stride 2 or none.
// Tensors are dense with the channels last: [images, height, width, channels]. A row is the channels of one position of
// an image.
struct Shape {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
  Activation activation;
  bool pool;

  bool relu() const {
    return activation.kind == Kind::Relu;
  }

  // Rows of the input.
  int64_t rows() const {
    return images * height * width;
  }
  // Sizes of the output. A pool drops an odd last row and column of an image.
  int64_t out_height() const {
    return pool ? height / 2 : height;
  }
  int64_t out_width() const {
    return pool ? width / 2 : width;
  }
  int64_t out_rows() const {
    return images * out_height() * out_width();
  }
  // Bytes of a row of the bits that tell which outputs of a ReLU are live: one bit a channel.
  int64_t bit_bytes() const {
    return (channels + 7) / 8;
  }
};

// The argmax of an output of the pool whose ReLU returned 0: no gradient flows to its window.
inline constexpr uint8_t kDead = 4;

// Walks over the windows of a pool, and gives the first input row of each without a division.
class WindowCursor {
 public:
  WindowCursor(const Shape& shape, int64_t window) : shape_(shape) {
    const int64_t in_image = shape.out_height() * shape.out_width();
    const int64_t image = window / in_image;
    const int64_t out_row = window % in_image / shape.out_width();
    column_ = window % shape.out_width();
    left_rows_ = shape.out_height() - out_row;
    row_ = (image * shape.height + 2 * out_row) * shape.width + 2 * column_;
  }
  int64_t row() const {
    return row_;
  }
  void advance() {
    row_ += 2;
    if (++column_ == shape_.out_width()) {
      column_ = 0;
      row_ += shape_.width + shape_.width % 2;
      if (--left_rows_ == 0) {
        left_rows_ = shape_.out_height();
        row_ += shape_.height % 2 * shape_.width;
      }
    }
  }

 private:
  const Shape& shape_;
  int64_t column_;
  int64_t left_rows_;
  int64_t row_;
};

}  // namespace lightkit::cpu::norm_act
