// The passes over the rows. Each writes the same whatever the number of threads.
#pragma once

#include "shape.h"

#include <cstdint>

namespace lightkit::cpu::norm_act {

// Computes the mean and the biased variance of each channel.
//
// The rows of a block are added up relative to a pivot, as in the corrected two-pass algorithm of Chan, Golub and
// LeVeque (Algorithms for Computing the Sample Variance, 1983), and the blocks are combined by their formula (2.1). The
// pivot is the mean of the block before. Squares of differences between means of blocks are part of the variance: the
// relative error of the variance is a small multiple of the rounding error, whatever the mean.
template <typename T>
void statistics(
    const Shape& shape,
    const T* input,     // [rows, channels]
    double* mean,       // [channels]
    double* variance);  // [channels]

// output = pool(f(input * scale + shift + residual)), where f is the activation function.
template <typename T>
struct Forward {
  Shape shape;
  const T* input;     // [rows, channels]
  const T* residual;  // [rows, channels], or null
  const T* scale;     // [channels]
  const T* shift;     // [channels]
  T* output;          // [out_rows, channels]
  // Which outputs are live, for backward; or null. With a pool: the position in its window that an output comes from
  // (the first of equals, NaN the largest, as in torch), or kDead behind a ReLU, [out_rows, channels]. With a ReLU
  // alone: the bits of the outputs that are not 0, [rows, bit_bytes]. Else null.
  uint8_t* live;
};

template <typename T>
void normalize(const Forward<T>& forward);

// Computes the rows of the output from `begin` to `end` in this thread, with a ReLU or no function.
template <typename T>
void normalize_tile(const Forward<T>& forward, int64_t begin, int64_t end);

// Computes `normalize` with a general activation function: tile by tile it normalizes, and applies the function to the
// tile in the cache. A function that is increasing is applied behind the pool, to a quarter of the values; its argmax
// is that of the values before the function.
template <typename T>
void normalize_and_activate(const Forward<T>& forward);

// Computes the gradient of the values before a general activation function, which are computed again: those of a row,
// or those that the outputs of the pool come from.
template <typename T>
struct ActivationGradient {
  Forward<T> forward;    // as in `normalize`, where `output` is the gradient, [out_rows, channels]
  const uint8_t* live;   // from `normalize`
  const T* grad_output;  // [out_rows, channels]
};

template <typename T>
void differentiate_rows(const ActivationGradient<T>& gradient);

// The gradient g of the normalized input is the gradient of the output where that is live, and 0 elsewhere.
template <typename T>
struct Gradient {
  Shape shape;
  const T* grad_output;  // [out_rows, channels]
  const uint8_t* live;   // from `normalize`
};

// Computes the sums over the rows of g, and of g * (input - mean).
template <typename T>
void gradient_sums(
    const Gradient<T>& gradient,
    const T* input,  // [rows, channels]
    const T* mean,   // [channels]
    double* sum,     // [channels]
    double* dot);    // [channels]

// grad_input = g * scale + (input - mean) * slope + offset, and grad_residual = g.
template <typename T>
struct GradientOutputs {
  const T* input;    // [rows, channels]
  const T* scale;    // [channels]
  const T* mean;     // [channels]
  const T* slope;    // [channels]; null leaves slope and offset out
  const T* offset;   // [channels]
  T* grad_input;     // [rows, channels], or null
  T* grad_residual;  // [rows, channels], or null
};

template <typename T>
void write_gradients(const Gradient<T>& gradient, const GradientOutputs<T>& outputs);

}  // namespace lightkit::cpu::norm_act
