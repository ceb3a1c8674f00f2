// The kernels of one layer: convolution, bias, ReLU and max-pool in one pass, and the gradients of input, weight and
// bias.
//
// A kernel runs on the thread that calls it; layer_chain.cpp shares work items and images out over the threads. No
// result depends on how they are shared out.
//
// Each gradient is a sum over the live outputs, whose argmax is not kDead; the others contribute 0.
#pragma once

#include "../common/aligned_buffer.h"
#include "shape.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace lightkit::cpu::layer_chain {

// output = maxpool(relu(conv(input, weight) + bias)).
template <typename T>
class ForwardKernel {
 public:
  ForwardKernel(
      const Shape& shape,
      const T* weight,  // [out_channels, in_channels, kernel_height, kernel_width]
      const T* bias);   // [out_channels], or null

  // Packs the weights of some work items. Every item is packed once, before `run`.
  void prepare(int64_t begin, int64_t end);
  // A work item is a vector of output channels.
  int64_t work_items() const {
    return vectors_;
  }

  // `argmax` is the position in its window that an output comes from (the first of equals, as in torch), or kDead.
  // Without a pool it is 0 or kDead. NaN is the largest value.
  void run(
      int64_t images,
      const T* input,          // [images, height, width, in_channels]
      T* output,               // [images, rows, columns, out_channels]
      uint8_t* argmax) const;  // as `output`, or null

 private:
  int64_t blocks() const;
  int64_t vectors(int64_t block) const;
  template <int window>
  void run_direct(int64_t images, const T* input, T* output, uint8_t* argmax) const;
  void run_single_channel(int64_t images, const T* input, T* output, uint8_t* argmax) const;
  void run_one_vector(int64_t images, const T* input, T* output, uint8_t* argmax) const;
  void run_half_vector(int64_t images, const T* input, T* output, uint8_t* argmax) const;
  void run_winograd(int64_t images, const T* input, T* output, uint8_t* argmax) const;

  const Shape shape_;
  const T* const weight_;
  const T* const bias_;
  const int64_t vectors_;
  const bool winograd_;
  AlignedBuffer<T> packed_;
  AlignedBuffer<T> packed_bias_;  // [vectors, width]
};

// Some rows and columns of the kernel.
template <typename T>
struct KernelPart;

template <typename T>
class GradInputKernel {
 public:
  GradInputKernel(const Shape& shape, const T* weight);  // [out_channels, in_channels, kernel_height, kernel_width]
  ~GradInputKernel();
  GradInputKernel(GradInputKernel&&) noexcept;

  // Packs the weights of some work items. Every item is packed once, before `run`.
  void prepare(int64_t begin, int64_t end);
  // A work item is an output channel.
  int64_t work_items() const {
    return shape_.out_channels;
  }
  void run(
      int64_t images,
      const T* grad_output,   // [images, rows, columns, out_channels]
      const uint8_t* argmax,  // as `grad_output`
      T* grad_input) const;   // [images, height, width, in_channels]

 private:
  int64_t packed_offset(size_t part, int64_t vector) const;

  const Shape shape_;
  const T* const weight_;
  const std::vector<KernelPart<T>> parts_;
  const int64_t part_size_;
  AlignedBuffer<T> packed_;  // [parts, vectors of in_channels, out_channels, part_size]
};

template <typename T>
struct GradWeightProblem {
  Shape shape;
  int64_t images;
  const T* grad_output;   // [images, rows, columns, out_channels]
  const uint8_t* argmax;  // as `grad_output`
  const T* input;         // [images, height, width, in_channels]
  T* grad_weight;         // [out_channels, in_channels, kernel_height, kernel_width]
  T* grad_bias;           // [out_channels]
};

template <typename T>
class GradWeightKernel {
 public:
  virtual ~GradWeightKernel() = default;
  virtual int64_t work_items() const = 0;
  virtual void run(int64_t begin, int64_t end) = 0;
  // The items of `finish`, which come after all work items.
  virtual int64_t finish_items() const {
    return 0;
  }
  virtual void finish(int64_t /*begin*/, int64_t /*end*/) {}
};

template <typename T>
std::unique_ptr<GradWeightKernel<T>> make_grad_weight(const GradWeightProblem<T>& problem);

}  // namespace lightkit::cpu::layer_chain
