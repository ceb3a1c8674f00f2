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
  // Which values are live, for backward; or null. With a max-pool: the position in its window that an output comes
  // from (the first of equals, NaN the largest, as in torch), or kDead behind a ReLU, [out_rows, channels]. Otherwise
  // with a ReLU: the bits of the values behind it that are not 0, [rows, bit_bytes]. Else null.
  uint8_t* live;
};

template <typename T>
void normalize(const Forward<T>& forward);

// Returns the pass over `rows` rows from `first` on, without a pool, to `output` [rows, channels].
template <typename T>
Forward<T> rows_without_pool(const Forward<T>& f, int64_t first, int64_t rows, T* output) {
  Forward<T> of_rows = f;
  of_rows.shape = {1, 1, rows, f.shape.channels, f.shape.activation, Pool::None};
  of_rows.input += first * f.shape.channels;
  of_rows.residual = f.residual == nullptr ? nullptr : f.residual + first * f.shape.channels;
  of_rows.output = output;
  // The argmax of a max-pool is no bit of a row.
  const bool has_bits = f.live != nullptr && !f.shape.is_max();
  of_rows.live = has_bits ? f.live + first * f.shape.bit_bytes() : nullptr;
  return of_rows;
}

// Computes the rows of the output from `begin` to `end` in this thread, without a mean, with a ReLU or no function.
template <typename T>
void normalize_tile(const Forward<T>& forward, int64_t begin, int64_t end);

// Computes `normalize` with a general activation function, without a mean: tile by tile it normalizes, and applies the
// function to the tile in the cache. A function that is increasing is applied behind the pool, to a quarter of the
// values; its argmax is that of the values before the function.
template <typename T>
void normalize_and_activate(const Forward<T>& forward);

// Computes `normalize` with a mean at the end: it normalizes tile by tile, and adds up the rows of the tile in the
// cache.
template <typename T>
void normalize_and_average(const Forward<T>& forward);

// Computes the gradient of the values before a general activation function, which are computed again: those of a row,
// or those that the outputs of the max-pool come from.
template <typename T>
struct ActivationGradient {
  Forward<T> forward;    // as in `normalize`, where `output` is the gradient, [gradient_rows, channels]
  const uint8_t* live;   // from `normalize`
  const T* grad_output;  // [out_rows, channels], of a mean divided by the rows of an image
};

template <typename T>
void differentiate_rows(const ActivationGradient<T>& gradient);

// The gradient g of the normalized input is the gradient of the output where that is live, and 0 elsewhere.
template <typename T>
struct Gradient {
  Shape shape;
  const T* grad_output;  // [out_rows, channels], of a mean divided by the rows of an image
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
