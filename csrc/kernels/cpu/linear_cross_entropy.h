// Cross-entropy of the logits hidden x linear_weight^T + linear_bias on a CPU. The logits exist tile by tile.
#pragma once

#include "simd.h"

#include <cstdint>

namespace lightkit::cpu {

// What is known of each row's logits once all have been seen: (rows) values each. lse is maximum + log_sum; apart they
// keep what is lost in a sum with a large maximum.
template <typename acc_t>
struct RowStatistics {
  acc_t* maximum;
  acc_t* log_sum;       // of exp(u - maximum)
  acc_t* target_log_p;  // u_target - lse
};

// Loss and gradient of a row are those of cross_entropy.h with target indices. No row is ignored: the caller leaves
// out those that are. Every target lies in [0, classes): the caller checks.
//
// All pointers are to distinct memory, rows one after the other.
template <typename scalar_t>
struct LinearCrossEntropy {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* hidden;         // (rows, features)
  const scalar_t* linear_weight;  // (classes, features)
  const acc_t* linear_bias;       // (classes), or null for none
  int64_t rows;
  int64_t features;
  int64_t classes;
  const int64_t* target;          // (rows)
  const acc_t* weight;            // (classes), or null for ones
  acc_t smoothing;
  acc_t z_loss;
  acc_t softcap;                  // 0: none

  // The loss: written, with what is known of each row, unless `losses` is null; then the latter is what an earlier
  // call has written.
  acc_t* losses;                  // (rows)
  RowStatistics<acc_t> rows_known;

  // The gradients of sum_r gradient_scale[r] loss[r], each written unless it is null.
  const acc_t* gradient_scale;    // (rows), or null: no gradients
  scalar_t* hidden_gradient;      // (rows, features)
  scalar_t* weight_gradient;      // (classes, features)
  acc_t* bias_gradient;           // (classes)

  // What the workspace may take, in bytes; it takes less where that is enough, and more where it is too little.
  int64_t memory_limit;
  char* workspace;                // aligned to 64 bytes; see `linear_cross_entropy_workspace`
};

// The bytes that `workspace` must have, with everything else in `args` set.
template <typename scalar_t>
int64_t linear_cross_entropy_workspace(const LinearCrossEntropy<scalar_t>& args);

// Runs on the threads of at::parallel_for. The results do not depend on their number.
//
// Where gradients of the type of the accumulators are wanted with the loss, rows are worked on in chunks whose logits
// fit into the limit: 3 products of (rows, features, classes). Otherwise every row is in the one chunk, so that each
// gradient of half precision is rounded once, and logits beyond the limit are computed twice: up to 4 products.
template <typename scalar_t>
void linear_cross_entropy(const LinearCrossEntropy<scalar_t>& args);

}  // namespace lightkit::cpu
