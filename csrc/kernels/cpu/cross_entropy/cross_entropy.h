// Cross-entropy of logits on a CPU: the loss of every row and, in the same pass, its gradient.
#pragma once

#include "../common/simd.h"
#include "tuning.h"

namespace lightkit::cpu::cross_entropy {

// The arguments of one call. For rows of logits z over C classes, let u = c tanh(z / c) with a softcap c (else u = z),
// p = softmax(u), lse = log sum exp(u), w the class weights and s the label smoothing:
//
//   with a target index t:    soft_c = s/C w_c                   hard = (1 - s) w_t
//   with probabilities q:     soft_c = w_c ((1 - s) q_c + s/C)   hard = 0
//
//   loss     = hard (lse - u_t) + sum_c soft_c (lse - u_c) + z_loss lse^2
//   gradient = scale ((hard + sum_c soft_c + 2 z_loss lse) p - hard [c = t] - soft_c) du/dz
//
// A row whose target is `ignore_index` has loss 0 and gradient 0. The caller checks that every other target lies in
// [0, C). All arrays are distinct, except that `gradient` may be `logits`.
template <typename scalar_t>
struct Rows {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* logits;  // [rows / inner, classes, inner]
  int64_t rows;
  int64_t classes;
  int64_t inner;                  // 1 if the classes are the last dimension
  const int64_t* target;          // [rows], or null for probabilities
  const scalar_t* probabilities;  // as `logits`, or null for indices
  int64_t ignore_index;
  const acc_t* weight;  // [classes], or null for ones
  const acc_t* smooth;  // [classes]: s/C w_c, or null if s = 0
  acc_t confidence;     // 1 - s
  acc_t z_loss;
  acc_t softcap;         // 0 for none
  acc_t gradient_scale;  // a factor of all gradients, such as 1/N for a mean
  acc_t* losses;         // [rows]
  acc_t* lse;            // [rows], or null
  scalar_t* gradient;    // as `logits`, or null for the loss alone
};

// Computes `losses`, `lse` and `gradient` on the threads of at::parallel_for. The results do not depend on their
// number. With inner > 1 it takes at most kMaxStridedClasses classes.
template <typename scalar_t>
void run(const Rows<scalar_t>& args);

}  // namespace lightkit::cpu::cross_entropy
