// Convolution, bias, ReLU and max-pool in one pass on a CPU, and its gradients.
//
// What is here runs on the thread that calls it: layer_chain.h deals the work out.
#pragma once

#include "simd.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

// A loop over an array of vectors stays in registers only if it is unrolled early: where this is a pragma. (The
// lambdas of c10::ForcedUnroll leave the array in memory.)
#if defined(__clang__)
#define LIGHTKIT_UNROLL _Pragma("unroll")
#else
#define LIGHTKIT_UNROLL _Pragma("GCC unroll 64")
#endif

namespace lightkit::cpu {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline constexpr int kWidth = Vec<T>::size();

// A convolution of stride 1 without padding, after it a ReLU or none, and a pool of 2x2 with stride 2 or none. Tensors
// are dense with the channels last: (images, rows, columns, channels).
struct ConvReluPoolShape {
  int64_t height;
  int64_t width;
  int64_t in_channels;
  int64_t out_channels;
  int64_t kernel_height;
  int64_t kernel_width;
  bool relu;
  bool pool;

  // Of the output. What a pool drops at the border is never computed.
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

  // Of the input.
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

  // Products of an image, without those that the pool drops.
  int64_t products() const {
    return positions() * quads() * out_channels * taps();
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
  explicit OutputCursor(const ConvReluPoolShape& shape) : shape_(shape), step_(shape.pool ? 2 : 1) {}

  // Of the first input of the output's image.
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
  const ConvReluPoolShape& shape_;
  const int64_t step_;
  int64_t column_ = 0;
  int64_t row_ = 0;
  int64_t image_offset_ = 0;
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

// The weight as the forward pass reads it, and the pass.
//
// Weights and their gradients are dense, (out_channels, in_channels, kernel_height, kernel_width).
template <typename T>
class ConvReluPoolForward {
 public:
  ConvReluPoolForward(const ConvReluPoolShape& shape, const T* weight, const T* bias);  // (out_channels), or null

  // Brings the weights of some of the `units()` into order: once for each, before `run`.
  void prepare(int64_t begin, int64_t end);
  int64_t units() const {
    return vectors_;
  }

  // output = maxpool(relu(input * weight + bias)). `index`, unless null, gets for every output which of its positions
  // won (the first of equals, as in torch), or kDead; 0 or kDead without a pool. NaN wins.
  void run(int64_t images, const T* input, T* output, uint8_t* index) const;

 private:
  int64_t blocks() const;
  int64_t vectors(int64_t block) const;
  template <int quads>
  void run(int64_t images, const T* input, T* output, uint8_t* index) const;
  void run_grey(int64_t images, const T* input, T* output, uint8_t* index) const;
  void run_winograd(int64_t images, const T* input, T* output, uint8_t* index) const;

  const ConvReluPoolShape shape_;
  const T* const weight_;
  const T* const bias_;
  const int64_t vectors_;
  const bool winograd_;
  AlignedBuffer<T> packed_;
  AlignedBuffer<T> packed_bias_;
};

// The gradients, from those of the outputs that `index` does not call dead: other products are with 0 and left out, but
// where that costs more (conv_relu_pool_thin.cpp). No result depends on how the work is dealt out.

// A part of the kernel: some of its rows and columns.
template <typename T>
struct KernelPart;

template <typename T>
class ConvReluPoolGradInput {
 public:
  ConvReluPoolGradInput(const ConvReluPoolShape& shape, const T* weight);
  ~ConvReluPoolGradInput();
  ConvReluPoolGradInput(ConvReluPoolGradInput&&) noexcept;

  // As of the forward pass.
  void prepare(int64_t begin, int64_t end);
  int64_t units() const {
    return shape_.out_channels;
  }
  void run(int64_t images, const T* grad_output, const uint8_t* index, T* grad_input) const;

 private:
  int64_t packed_place(size_t part, int64_t vector) const;

  const ConvReluPoolShape shape_;
  const T* const weight_;
  const std::vector<KernelPart<T>> parts_;
  const int64_t part_size_;
  AlignedBuffer<T> packed_;
};

// All that the gradients of a weight and a bias are made of.
template <typename T>
struct ConvReluPoolWeightProblem {
  ConvReluPoolShape shape;
  int64_t images;
  const T* grad_output;
  const uint8_t* index;
  const T* input;
  T* grad_weight;
  T* grad_bias;  // (out_channels)
};

template <typename T>
class ConvReluPoolGradWeight {
 public:
  virtual ~ConvReluPoolGradWeight() = default;
  virtual int64_t units() const = 0;
  virtual void run(int64_t begin, int64_t end) = 0;
  // After all units.
  virtual void finish() {}
};

template <typename T>
std::unique_ptr<ConvReluPoolGradWeight<T>> make_grad_weight(const ConvReluPoolWeightProblem<T>& problem);

}  // namespace lightkit::cpu
