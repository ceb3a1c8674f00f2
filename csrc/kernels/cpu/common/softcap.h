// The softcap of logits, u = c tanh(z / c), and its derivative (Gemma 2, 2024).
#pragma once

#include "simd.h"

#include <cmath>

namespace lightkit::cpu {

template <typename acc_t>
at::vec::Vectorized<acc_t> capped(const at::vec::Vectorized<acc_t>& z, acc_t softcap) {
  return at::vec::Vectorized<acc_t>(softcap) * (z / at::vec::Vectorized<acc_t>(softcap)).tanh();
}

// Returns z if `softcap` is 0.
template <typename acc_t>
acc_t capped(acc_t z, acc_t softcap) {
  return softcap == 0 ? z : softcap * std::tanh(z / softcap);
}

// Returns du/dz at the capped logit u.
template <typename value_t, typename acc_t>
value_t cap_slope(const value_t& u, acc_t softcap) {
  const value_t ratio = u / value_t(softcap);
  return value_t(acc_t(1)) - ratio * ratio;
}

}  // namespace lightkit::cpu
