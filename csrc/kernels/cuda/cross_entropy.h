// Cross-entropy of logits on a GPU. Same quantities as ../cpu/cross_entropy.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lightkit::cuda {

enum class LogitsType : uint8_t { Float, Double, BFloat16, Half };

// Device memory that the kernels of one call pass on to each other. Sums over all rows are taken over parts of
// them, whose number depends on that of the rows alone: the result is the same on every device.
struct CrossEntropyScratch {
  static constexpr int kParts = 128;
  double weights[kParts];  // what a mean divides by, of each part
  double losses[kParts];   // their sum, of each part
  unsigned finished;       // parts whose losses are summed
};

// All pointers are to memory of the current device; "acc" is float, or double for double logits.
struct CrossEntropyRows {
  LogitsType type;
  const void* logits;         // (rows, classes), contiguous
  int64_t rows;
  int64_t classes;
  const int64_t* target;      // (rows), or null for probabilities
  const void* probabilities;  // laid out as `logits` and of their type, or null for indices
  int64_t ignore_index;
  const void* weight;         // (classes) acc, or null for ones
  double smoothing;
  double z_loss;
  double softcap;             // 0: none
  bool mean;                  // divide gradient and total by the summed weight of the targets
  CrossEntropyScratch* scratch;
  void* losses;               // (rows) acc
  void* lse;                  // (rows) acc, or null
  void* gradient;             // (rows, classes), contiguous, or null: the loss alone; may be `logits`
  void* total;                // the sum or mean of the losses; null if not wanted
  LogitsType total_type;
};

// Everything is enqueued on `stream`; nothing waits for the device or allocates, so the call can be captured
// into a CUDA graph. A target outside [0, classes) that is not ignore_index stops the kernel with a message and
// a trap before any memory is touched through it.
cudaError_t cross_entropy(const CrossEntropyRows& args, cudaStream_t stream);

// gradient *= factor[0], or with `per_row` gradient[r, :] *= factor[r]; memory is touched only where the
// factor is not 1. `factor` is acc.
cudaError_t scale_rows(
    void* gradient, LogitsType type, int64_t rows, int64_t classes, const void* factor, bool per_row, cudaStream_t stream);

}  // namespace lightkit::cuda
