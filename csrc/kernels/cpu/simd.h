// What the CPU kernels share: accumulators wider than the data, and an exp made for softmax.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace lightkit::cpu {

// Half-precision data is accumulated in float, everything else in its own type.
template <typename scalar_t>
using accumulator_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
inline constexpr bool is_half = std::is_same_v<scalar_t, at::BFloat16> || std::is_same_v<scalar_t, at::Half>;

// `count` values as accumulators: the data itself where the types agree, else converted into `buffer`.
template <typename scalar_t>
inline const accumulator_t<scalar_t>* as_accumulators(
    const scalar_t* data, int64_t count, accumulator_t<scalar_t>* buffer) {
  if constexpr (is_half<scalar_t>) {
    at::vec::convert(data, buffer, count);
    return buffer;
  } else {
    return data;
  }
}

// exp(x) for x <= 0, within 1.2 units in the last place; 0 from -88 down; NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, then a degree-6 minimax polynomial in r, times 2^n built from its
// exponent bits. The clamp at -88 makes those bits 0, so that what would underflow is exactly 0 at no cost.
inline at::vec::Vectorized<float> exp_nonpositive(at::vec::Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using Vec = at::vec::Vectorized<float>;
  using IntVec = at::vec::Vectorized<int32_t>;
  x = at::vec::clamp_min(x, Vec(-88.0f));
  const Vec n = (x * Vec(1.44269504f)).round();
  // ln 2 in two parts, the first short enough for n * part to be exact.
  Vec r = at::vec::fmadd(n, Vec(-0.693359375f), x);
  r = at::vec::fmadd(n, Vec(2.12194440e-4f), r);
  Vec p = Vec(1.38145394e-3f);
  p = at::vec::fmadd(p, r, Vec(8.36874544e-3f));
  p = at::vec::fmadd(p, r, Vec(4.16683890e-2f));
  p = at::vec::fmadd(p, r, Vec(0.166665211f));
  p = at::vec::fmadd(p, r, Vec(0.499999940f));
  p = at::vec::fmadd(p, r, Vec(1.0f));
  p = at::vec::fmadd(p, r, Vec(1.0f));
  const IntVec bits = (at::vec::convert_to_int_of_same_size(n) + IntVec(127)) << IntVec(23);
  return p * at::vec::cast<float>(bits);
#else
  return x.exp();
#endif
}

inline at::vec::Vectorized<double> exp_nonpositive(at::vec::Vectorized<double> x) {
  return x.exp();
}

}  // namespace lightkit::cpu
