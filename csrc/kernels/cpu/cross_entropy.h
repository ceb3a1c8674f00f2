// Cross-entropy of logits with class indices on a CPU: the loss of every row and, in the same pass, its gradient.
#pragma once

#include "simd.h"

namespace lightkit::cpu {

// Rows of logits z with target t, class weights w, label smoothing s over C classes and p = softmax(z):
//
//   loss     = (1 - s) w_t (lse - z_t) + s/C sum_c w_c (lse - z_c)
//   gradient = scale * ( ((1 - s) w_t + s/C sum_c w_c) p - (1 - s) w_t [c = t] - s/C w_c )
//
// A row whose target is `ignore_index` has loss 0 and gradient 0. Every other target must lie in [0, C):
// the caller checks. All pointers are to distinct memory, except that `gradient` may be `logits`.
template <typename scalar_t>
struct CrossEntropyRows {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* logits;    // (rows, classes), contiguous
  int64_t rows;
  int64_t classes;
  const int64_t* target;     // (rows)
  int64_t ignore_index;
  const acc_t* weight;       // (classes), or null for ones
  const acc_t* smooth;       // (classes): s/C w_c, or null where s = 0
  acc_t smooth_sum;          // sum of `smooth`
  acc_t confidence;          // 1 - s
  acc_t gradient_scale;      // what is known of the upstream gradient, such as 1/N of a mean
  acc_t* losses;             // (rows)
  scalar_t* gradient;        // (rows, classes), contiguous, or null: the loss alone
};

// Computes `losses` and `gradient` on the threads of at::parallel_for. What a row gets does not depend on
// how the rows are shared out.
template <typename scalar_t>
void cross_entropy(const CrossEntropyRows<scalar_t>& args);

}  // namespace lightkit::cpu
