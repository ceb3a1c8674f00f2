// Cross-entropy of logits that exist a slice of classes at a time, on a GPU. ../../cpu/cross_entropy/cross_entropy.h
// has the formulas. cuBLAS computes the products before and after these kernels.
#pragma once

#include "../../common/element_type.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lightkit::cuda::linear_cross_entropy {

// The arguments of one call. All arrays are on the current device; "acc" is float, or double for the type double.
struct Slice {
  ElementType type;    // of the gradient
  const void* logits;  // [rows, classes] acc, contiguous: before bias and softcap
  int64_t rows;
  int64_t begin;  // the slice has the classes [begin, begin + classes) of `all_classes`
  int64_t classes;
  int64_t all_classes;
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  const void* bias;    // [all_classes] acc, or null
  const void* weight;  // [all_classes] acc, or null for ones
  bool smooth;         // computes `soft`, for label smoothing
  double softcap;      // 0 for none

  // The sums of each row over the slices so far. An ignored row has 0, 1, 0, 0.
  void* maximum;       // [rows] acc
  void* sum;           // [rows] acc: sum_c exp(u_c - maximum)
  void* soft;          // [rows] acc: sum_c weight_c u_c
  void* target_logit;  // [rows] acc

  // The parts of the gradient: (factor exp(u - maximum) - soft_factor weight_c) du/dz, and `target_gradient` at the
  // target, with the maximum over all slices.
  const void* factor;           // [rows] acc
  const void* soft_factor;      // [rows] acc
  const void* target_gradient;  // [rows] acc
  void* gradient;               // [rows, classes], contiguous; may be `logits` if the types agree
};

// Enqueues the sums of the slice; slices come in the order of their classes. A target outside [0, all_classes) that is
// not ignore_index stops the kernel with a message and a trap.
cudaError_t add_slice(const Slice& args, cudaStream_t stream);

// Enqueues the gradient with respect to the logits of the slice; 0 for ignored rows.
cudaError_t slice_gradient(const Slice& args, cudaStream_t stream);

}  // namespace lightkit::cuda::linear_cross_entropy
