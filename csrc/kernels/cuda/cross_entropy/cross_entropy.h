// Cross-entropy of logits on a GPU. ../../cpu/cross_entropy/cross_entropy.h has the formulas.
#pragma once

#include "../../common/element_type.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lightkit::cuda::cross_entropy {

// Device memory through which the kernels of one call pass sums over all rows. The rows are summed in parts, whose
// number depends on the number of rows alone: the result is the same on every device.
struct Scratch {
  // Chosen; one block adds the parts up, so that there are at most kSumThreads.
  static constexpr int kParts = 128;
  double weights[kParts];  // each part of the denominator of a mean
  double losses[kParts];   // each part's sum of the losses
  unsigned finished;       // parts whose losses are complete
};

// The arguments of one call. All arrays are on the current device; "acc" is float, or double for double logits.
struct Rows {
  ElementType type;
  const void* logits;  // [rows, classes], contiguous
  int64_t rows;
  int64_t classes;
  const int64_t* target;      // [rows], or null for probabilities
  const void* probabilities;  // as `logits`, or null for indices
  int64_t ignore_index;
  const void* weight;  // [classes] acc, or null for ones
  double smoothing;
  double z_loss;
  double softcap;  // 0 for none
  bool mean;       // divides gradient and total by the summed weight of the targets
  Scratch* scratch;
  void* losses;    // [rows] acc
  void* lse;       // [rows] acc, or null
  void* gradient;  // as `logits`, or null for the loss alone; may be `logits`
  void* total;     // [1]: the sum or mean of the losses; or null
  ElementType total_type;
};

// Enqueues the kernels on `stream`. It neither waits nor allocates, so that a CUDA graph can capture it. A target
// outside [0, classes) that is not ignore_index stops the kernel with a message and a trap, before the target is used.
cudaError_t run(const Rows& args, cudaStream_t stream);

// Enqueues gradient *= factor[0], or gradient[r, :] *= factor[r] with `per_row`. A factor of 1 touches no memory.
cudaError_t scale_rows(
    void* gradient,  // [rows, classes]
    ElementType type,
    int64_t rows,
    int64_t classes,
    const void* factor,  // [1], or [rows] with `per_row`, acc
    bool per_row,
    cudaStream_t stream);

}  // namespace lightkit::cuda::cross_entropy
