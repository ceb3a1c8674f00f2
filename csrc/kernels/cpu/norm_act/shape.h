// The shapes of a normalization, and how its tensors lie in memory.
#pragma once

#include "activation.h"

#include <algorithm>
#include <cstdint>

namespace lightkit::cpu::norm_act {

// What follows the activation function. The values are part of the op's schema.
enum class Pool : int64_t {
  None,
  Max,   // the largest of each 2x2 window, with stride 2
  Mean,  // the mean of each image
  Last = Mean,
};

// A normalization of each channel, then an activation function or none, then a pool or none.
// Tensors are dense with the channels last: [images, height, width, channels]. A row is the channels of one position of
// an image.
struct Shape {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
  Activation activation;
  Pool pool;

  bool is_max() const {
    return pool == Pool::Max;
  }
  bool is_mean() const {
    return pool == Pool::Mean;
  }
  bool relu() const {
    return activation.kind == Kind::Relu;
  }

  // Rows of the input.
  int64_t rows() const {
    return images * image_rows();
  }
  int64_t image_rows() const {
    return height * width;
  }
  // Sizes of the output. A max-pool drops an odd last row and column of an image.
  int64_t out_height() const {
    return is_max() ? height / 2 : is_mean() ? 1 : height;
  }
  int64_t out_width() const {
    return is_max() ? width / 2 : is_mean() ? 1 : width;
  }
  int64_t out_rows() const {
    return images * out_height() * out_width();
  }
  // Rows that backward visits: the outputs of a max-pool, or else all rows of the input.
  int64_t gradient_rows() const {
    return is_max() ? out_rows() : rows();
  }
  // Returns the end of the rows from `row` to `end` whose gradients come from the same row of a mean's output.
  int64_t end_of_run(int64_t row, int64_t end) const {
    return is_mean() ? std::min(end, (row / image_rows() + 1) * image_rows()) : end;
  }
  // Bytes of a row of the bits that tell which outputs of a ReLU are live: one bit a channel.
  int64_t bit_bytes() const {
    return (channels + 7) / 8;
  }
};

// The argmax of an output of the max-pool whose ReLU returned 0: no gradient flows to its window.
inline constexpr uint8_t kDead = 4;

// Walks over the windows of a max-pool, and gives the first input row of each without a division.
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
