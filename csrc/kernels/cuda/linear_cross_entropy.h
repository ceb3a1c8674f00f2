// Cross-entropy of logits that exist a slice of classes at a time, on a GPU. Same quantities as
// ../cpu/cross_entropy.h; the products that make logits, and gradients of their gradient, are cuBLAS's.
#pragma once

#include "cross_entropy.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lightkit::cuda {

// All pointers are to memory of the current device; "acc" is float, or double for the type double.
struct LinearCrossEntropySlice {
  LogitsType type;         // of the gradient
  const void* logits;      // (rows, classes) acc, contiguous: before bias and softcap
  int64_t rows;
  int64_t begin;           // the slice is classes [begin, begin + classes) of `all_classes`
  int64_t classes;
  int64_t all_classes;
  const int64_t* target;   // (rows)
  int64_t ignore_index;
  const void* bias;        // (all_classes) acc, or null
  const void* weight;      // (all_classes) acc, or null for ones
  bool smooth;             // whether `soft` is wanted below
  double softcap;          // 0: none

  // What is known of each row after the slices so far: (rows) acc each. A row that is ignored has 0, 1, 0, 0.
  void* maximum;
  void* sum;               // of exp(u - maximum)
  void* soft;              // sum of weight_c u_c
  void* target_logit;

  // What its gradient consists of: factor exp(u - maximum) - soft_factor weight_c, times the slope of the softcap, and
  // target_gradient at the target. (rows) acc each, with the maximum of all slices.
  const void* factor;
  const void* soft_factor;
  const void* target_gradient;
  void* gradient;          // (rows, classes), contiguous; may be `logits` where the types agree
};

// Takes the slice into maximum, sum, soft and target_logit; slices come in the order of their classes. A target outside
// [0, all_classes) that is not ignore_index stops the kernel with a message and a trap.
cudaError_t add_slice(const LinearCrossEntropySlice& args, cudaStream_t stream);

// Writes the gradient with respect to the logits of the slice; 0 for rows that are ignored.
cudaError_t slice_gradient(const LinearCrossEntropySlice& args, cudaStream_t stream);

}  // namespace lightkit::cuda
