// The algorithms of the convolution, for one group.
#pragma once

#include "correlation.h"
#include "moments.h"

#include <vector>

namespace lightkit::cpu::conv2d {

// Computes a correlation. If `moments` is not null, it gets the moments of each channel of the results.
template <typename T>
struct CorrelationProblem {
  const Correlation& correlation;
  Images<const T> source;
  Weights<T> weights;
  const T* bias;  // [out_channels], or null
  Images<T> results;
  Moments* moments;
};

// Takes every correlation.
template <typename T>
void correlate_directly(const CorrelationProblem<T>& problem);
// Takes 3x3 correlations of step 1.
template <typename T>
void correlate_by_row_winograd(const CorrelationProblem<T>& problem);
// Takes 3x3 correlations of step 1 on whole vectors of input channels.
template <typename T>
void correlate_by_winograd(const CorrelationProblem<T>& problem);
// Takes all groups of a depthwise convolution at once: result channel i has the sum over the taps of source channel i.
template <typename T>
void correlate_depthwise(const CorrelationProblem<T>& problem);

// The gradients of the weight and the bias of one group.
template <typename T>
struct GradWeightProblem {
  const Correlation& correlation;  // of the forward pass
  Images<const T> input;
  Images<const T> grad_output;  // the channels are dense
  int64_t kernel_size;
  T* grad_weight;  // [out_channels, in_channels, kernel_size], 0 at the taps that the correlation lacks; or null
  T* grad_bias;    // [out_channels], or null
};

// These take the same as the functions above. Those of rows and by Winograd need `grad_weight`.
template <typename T>
void grad_weight_directly(const GradWeightProblem<T>& problem);
template <typename T>
void grad_weight_by_rows(const GradWeightProblem<T>& problem);
template <typename T>
void grad_weight_by_winograd(const GradWeightProblem<T>& problem);
template <typename T>
void grad_weight_depthwise(const GradWeightProblem<T>& problem);

}  // namespace lightkit::cpu::conv2d
