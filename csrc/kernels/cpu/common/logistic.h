// The logistic function of a vector.
#pragma once

#include "simd.h"

namespace lightkit::cpu {

// Returns 1 / (1 + exp(-x)), and 0 where that is below 1e-37 or, in double precision, 1e-304: there exp would leave its
// range.
template <typename T>
at::vec::Vectorized<T> logistic(const at::vec::Vectorized<T>& x) {
  using Vec = at::vec::Vectorized<T>;
  constexpr T limit = sizeof(T) == 8 ? 700 : 87;
  const Vec one(1), negative = x.neg();
  const auto result = one / (one + exp_bounded(at::vec::clamp_max(negative, Vec(limit))));
  return Vec::blendv(result, Vec(0), negative > Vec(limit));
}

}  // namespace lightkit::cpu
