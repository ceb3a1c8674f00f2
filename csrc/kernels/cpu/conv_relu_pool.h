// Convolution, bias, ReLU and max-pool in one pass on a CPU, and its gradients.
#pragma once

#include "simd.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>

// A loop over an array of vectors stays in registers only if it is unrolled early: where this is a pragma. (The
// lambdas of c10::ForcedUnroll leave the array in memory.)
#if defined(__clang__)
#define LIGHTKIT_UNROLL _Pragma("unroll")
#else
#define LIGHTKIT_UNROLL _Pragma("GCC unroll 64")
#endif

namespace lightkit::cpu {

// A convolution of stride 1 without padding, and a pool of 2x2 with stride 2 after it or none. Tensors are
// dense with the channels last: (images, rows, columns, channels).
struct ConvReluPoolShape {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t in_channels;
  int64_t out_channels;
  int64_t kernel_height;
  int64_t kernel_width;
  bool pool;

  // Of the output. What a pool drops at the border is never computed.
  int64_t rows() const {
    return (height - kernel_height + 1) / (pool ? 2 : 1);
  }
  int64_t columns() const {
    return (width - kernel_width + 1) / (pool ? 2 : 1);
  }
  int64_t outputs() const {
    return images * rows() * columns();
  }

  int64_t image_size() const {
    return height * row_size();
  }
  int64_t row_size() const {
    return width * in_channels;
  }
  // The inputs that a row of the kernel reads for one position: they lie one after the other.
  int64_t run() const {
    return kernel_width * in_channels;
  }
  int64_t kernel_size() const {
    return kernel_height * kernel_width;
  }
  // Products in one value of the convolution.
  int64_t taps() const {
    return kernel_size() * in_channels;
  }

  // Positions of the convolution that make one output, and how far their inputs lie from those of the first:
  // (0, 0), (0, 1), (1, 0), (1, 1).
  int quads() const {
    return pool ? 4 : 1;
  }
  std::array<int64_t, 4> quad_offsets() const {
    return {0, in_channels, row_size(), row_size() + in_channels};
  }
};

// In place of a position's number: the ReLU was 0, and no gradient flows.
inline constexpr uint8_t kDead = 4;

// Where the inputs of consecutive outputs begin, without a division for each.
class OutputCursor {
 public:
  OutputCursor(const ConvReluPoolShape& shape, int64_t output)
      : shape_(shape),
        step_(shape.pool ? 2 : 1),
        column_(output % shape.columns()),
        row_(output / shape.columns() % shape.rows()),
        image_(output / (shape.columns() * shape.rows())) {}

  int64_t image() const {
    return image_;
  }
  // From the beginning of the image.
  int64_t offset() const {
    return step_ * (row_ * shape_.row_size() + column_ * shape_.in_channels);
  }
  void advance() {
    if (++column_ == shape_.columns()) {
      column_ = 0;
      if (++row_ == shape_.rows()) {
        row_ = 0;
        ++image_;
      }
    }
  }

 private:
  const ConvReluPoolShape& shape_;
  const int64_t step_;
  int64_t column_;
  int64_t row_;
  int64_t image_;
};

// Memory of which no vector lies in two cache lines, not initialised.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  T* data() {
    return data_.get();
  }
  const T* data() const {
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* data) const {
      ::operator delete(data, kAlignment);
    }
  };
  std::unique_ptr<T, Delete> data_;
};

// output = maxpool(relu(input * weight + bias)), in float or double. `index`, unless null, gets for every output
// which of its positions won (the first of equals, as in torch), or kDead; 0 or kDead without a pool. NaN wins.
// Weights and their gradients are dense, (out_channels, in_channels, kernel_height, kernel_width).
template <typename T>
void conv_relu_pool_forward(
    const ConvReluPoolShape& shape,
    const T* input,
    const T* weight,
    const T* bias,  // (out_channels), or null
    T* output,
    uint8_t* index);

// The gradients, from those of the outputs that `index` does not call dead: other products are with 0 and left out,
// but where that costs more (conv_relu_pool_thin.cpp). All run on the threads of at::parallel_for, and none depends on
// how many there are.
template <typename T>
void conv_relu_pool_grad_input(
    const ConvReluPoolShape& shape,
    const T* grad_output,
    const uint8_t* index,
    const T* weight,
    T* grad_input);

template <typename T>
void conv_relu_pool_grad_weight(
    const ConvReluPoolShape& shape,
    const T* grad_output,
    const uint8_t* index,
    const T* input,
    T* grad_weight,
    T* grad_bias);  // (out_channels)

// What it takes to bring a weight to another place, in multiplications.
inline constexpr int64_t kPackingCost = 16;

// How many items of `products` multiplications each are worth a thread.
inline int64_t conv_grain(int64_t products) {
  return std::max<int64_t>(1, (int64_t(1) << 17) / std::max<int64_t>(1, products));
}

}  // namespace lightkit::cpu
