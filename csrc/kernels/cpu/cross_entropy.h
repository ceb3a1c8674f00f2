// Cross-entropy of logits on a CPU: the loss of every row and, in the same pass, its gradient.
#pragma once

#include "simd.h"

namespace lightkit::cpu {

// Rows of logits z over C classes, u = c tanh(z / c) with a softcap c (else u = z), p = softmax(u),
// lse = log sum exp(u), class weights w, label smoothing s:
//
//   a target index t:     soft_c = s/C w_c                        hard = (1 - s) w_t
//   probabilities q:      soft_c = w_c ((1 - s) q_c + s/C)        hard = 0
//
//   loss     = hard (lse - u_t) + sum_c soft_c (lse - u_c) + z_loss lse^2
//   gradient = scale ((hard + sum_c soft_c + 2 z_loss lse) p - hard [c = t] - soft_c) du/dz
//
// A row whose target is `ignore_index` has loss 0 and gradient 0. Every other target must lie in [0, C):
// the caller checks. All pointers are to distinct memory, except that `gradient` may be `logits`.
template <typename scalar_t>
struct CrossEntropyRows {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* logits;         // (rows / inner, classes, inner), contiguous; rows are (outer, inner) in order
  int64_t rows;
  int64_t classes;
  int64_t inner;                  // 1, or more where the classes are not the last dimension
  const int64_t* target;          // (rows), or null for probabilities
  const scalar_t* probabilities;  // laid out as `logits`, or null for indices
  int64_t ignore_index;
  const acc_t* weight;            // (classes), or null for ones
  const acc_t* smooth;            // (classes): s/C w_c, or null where s = 0
  acc_t confidence;               // 1 - s
  acc_t z_loss;
  acc_t softcap;                  // 0: none
  acc_t gradient_scale;           // what is known of the upstream gradient, such as 1/N of a mean
  acc_t* losses;                  // (rows)
  acc_t* lse;                     // (rows), or null
  scalar_t* gradient;             // laid out as `logits`, or null: the loss alone
};

// With inner > 1, the most classes that cross_entropy takes.
constexpr int64_t kMaxStridedClasses = 128;

// Computes `losses`, `lse` and `gradient` on the threads of at::parallel_for. What a row gets does not depend
// on how the rows are shared out.
template <typename scalar_t>
void cross_entropy(const CrossEntropyRows<scalar_t>& args);

}  // namespace lightkit::cpu
