// Cross-entropy of the logits hidden x linear_weight^T + linear_bias on a CPU. The logits are never in memory as a
// whole (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025).
#pragma once

#include "../common/simd.h"

#include <cstdint>

namespace lightkit::cpu::linear_cross_entropy {

// Statistics of each row's logits over all classes. lse = maximum + log_sum; the two parts keep digits that a sum with
// a large maximum would lose.
template <typename acc_t>
struct RowStatistics {
  acc_t* maximum;       // [rows]
  acc_t* log_sum;       // [rows]: log sum exp(u - maximum)
  acc_t* target_log_p;  // [rows]: u_target - lse
};

// The arguments of one call. ../cross_entropy/cross_entropy.h has the formulas of a row's loss and gradient, here with
// a target index. The caller leaves out rows that are ignored, and checks that every target lies in [0, classes).
//
// All arrays are contiguous and distinct.
template <typename scalar_t>
struct Problem {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* hidden;         // [rows, features]
  const scalar_t* linear_weight;  // [classes, features]
  const acc_t* linear_bias;       // [classes], or null
  int64_t rows;
  int64_t features;
  int64_t classes;
  const int64_t* target;  // [rows]
  const acc_t* weight;    // [classes], or null for ones
  acc_t smoothing;
  acc_t z_loss;
  acc_t softcap;  // 0 for none

  // The call writes losses and row statistics. If `losses` is null, it reads the statistics that an earlier call wrote.
  acc_t* losses;  // [rows], or null
  RowStatistics<acc_t> row_statistics;

  // The call writes the gradients of sum_r gradient_scale[r] loss[r] that are not null.
  const acc_t* gradient_scale;  // [rows], or null for no gradients
  scalar_t* hidden_gradient;    // [rows, features], or null
  scalar_t* weight_gradient;    // [classes, features], or null
  acc_t* bias_gradient;         // [classes], or null

  // The bytes that the workspace should take: it takes fewer if they suffice, and more if they are too few to progress.
  int64_t memory_limit;
  char* workspace;  // [workspace_bytes(args)], aligned to 64 bytes
};

// Returns the bytes of `args.workspace`; all other arguments are set.
template <typename scalar_t>
int64_t workspace_bytes(const Problem<scalar_t>& args);

// Runs on the threads of at::parallel_for. The results do not depend on their number.
//
// A call that computes loss and gradients in the accumulation type works on chunks of rows whose logits fit the limit:
// it takes 3 products of (rows, features, classes). Any other call has all rows in one chunk, so that each
// half-precision gradient is rounded once; it computes logits beyond the limit twice, and takes up to 4 products.
template <typename scalar_t>
void run(const Problem<scalar_t>& args);

}  // namespace lightkit::cpu::linear_cross_entropy
