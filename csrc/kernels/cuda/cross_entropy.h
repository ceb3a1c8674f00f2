// Cross-entropy of logits on a GPU. Same quantities as ../cpu/cross_entropy.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lightkit::cuda {

enum class LogitsType : uint8_t { Float, Double, BFloat16, Half };

// All pointers are to memory of the current device; "acc" is float, or double for double logits.
struct CrossEntropyRows {
  LogitsType type;
  const void* logits;      // (rows, classes), contiguous
  int64_t rows;
  int64_t classes;
  const int64_t* target;   // (rows), or null for probabilities
  const void* probabilities;  // laid out as `logits` and of their type, or null for indices
  int64_t ignore_index;
  const void* weight;      // (classes) acc, or null for ones
  const void* smooth;      // (classes) acc, or null where there is no label smoothing
  double confidence;       // 1 - label smoothing
  double z_loss;
  double softcap;          // 0: none
  bool mean;               // scale the gradient by 1 / denominator
  double* denominator;     // scratch: what a mean divides by
  void* losses;            // (rows) acc
  void* lse;               // (rows) acc, or null
  void* gradient;          // (rows, classes), contiguous, or null: the loss alone; may be `logits`
  double* total;           // sum of the losses, divided by the denominator of a mean; null if not wanted
};

// Everything is enqueued on `stream`; nothing waits for the device. A target outside [0, classes) that is not
// ignore_index stops the kernel with a message and a trap before any memory is touched through it.
cudaError_t cross_entropy(const CrossEntropyRows& args, cudaStream_t stream);

// gradient *= factor[0], or with `per_row` gradient[r, :] *= factor[r]; memory is touched only where the
// factor is not 1. `factor` is acc.
cudaError_t scale_rows(
    void* gradient, LogitsType type, int64_t rows, int64_t classes, const void* factor, bool per_row, cudaStream_t stream);

}  // namespace lightkit::cuda
