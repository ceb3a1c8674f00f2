// Batch normalization, residual, activation function and pool on a CPU, with their gradients (Ioffe and Szegedy,
// Batch Normalization, 2015).
#pragma once

#include "shape.h"

#include <cstdint>

namespace lightkit::cpu::norm_act {

// output = pool(f((input - mean) / sqrt(variance + eps) * weight + bias + residual)), f the activation function.
template <typename T>
struct ForwardProblem {
  Shape shape;
  const T* input;       // [rows, channels]
  const T* weight;      // [channels], or null for 1
  const T* bias;        // [channels], or null for 0
  const T* residual;    // [rows, channels], or null
  const T* statistics;  // [2, channels], mean and biased variance of the input; null computes them
  // In training they are updated unless they are null, the variance with the unbiased one. Otherwise they take the
  // place of mean and variance.
  T* running_mean;  // [channels]
  T* running_var;   // [channels]
  bool training;
  double momentum;
  double eps;
  T* output;      // [out_rows, channels]
  T* kept;        // [2, channels], mean and 1 / sqrt(variance + eps)
  uint8_t* live;  // as in passes.h, or null
};

template <typename T>
void forward(const ForwardProblem<T>& problem);

template <typename T>
struct BackwardProblem {
  Shape shape;
  const T* grad_output;  // [out_rows, channels]
  const T* input;        // [rows, channels]
  const T* weight;       // [channels], or null for 1
  const T* bias;         // [channels], or null for 0; read for a general activation function, as is the residual
  const T* residual;     // [rows, channels], or null
  const T* kept;         // from `forward`
  const uint8_t* live;   // from `forward`
  bool training;
  // The gradients that are null are not wanted; those of weight and bias are both null or neither.
  T* grad_input;     // [rows, channels]
  T* grad_weight;    // [channels]
  T* grad_bias;      // [channels]
  T* grad_residual;  // [rows, channels]
};

template <typename T>
void backward(const BackwardProblem<T>& problem);

}  // namespace lightkit::cpu::norm_act
