// What the CPU kernels share: accumulators wider than the data, loops over vectors, an exp made for softmax.
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

// exp(x) for x <= 0, with an absolute error below 2e-7; exactly 0 from -88 down; NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, then a degree-5 minimax polynomial in r, times 2^n. Adding 1.5 * 2^23
// rounds to an integer and leaves it in the low bits of the sum; with 127 added too, shifted by 23, these are
// the bits of 2^n, and 0 for the n that the clamp at -88 gives: what would underflow is 0 at no cost. One part
// of ln 2 is enough: its error counts where n is large, and there the result is next to nothing.
inline at::vec::Vectorized<float> exp_nonpositive(at::vec::Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using Vec = at::vec::Vectorized<float>;
  using IntVec = at::vec::Vectorized<int32_t>;
  const Vec rounder(12582912.0f + 127.0f);
  x = at::vec::clamp_min(x, Vec(-88.0f));
  const Vec shifted = at::vec::fmadd(x, Vec(1.44269504f), rounder);
  const Vec n = shifted - rounder;
  const Vec r = at::vec::fmadd(n, Vec(-0.693147182f), x);
  Vec p = Vec(8.31250101e-3f);
  p = at::vec::fmadd(p, r, Vec(4.18903306e-2f));
  p = at::vec::fmadd(p, r, Vec(0.166671157f));
  p = at::vec::fmadd(p, r, Vec(0.499992311f));
  p = at::vec::fmadd(p, r, Vec(1.0f));
  p = at::vec::fmadd(p, r, Vec(1.0f));
  return p * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << IntVec(23));
#else
  return x.exp();
#endif
}

inline at::vec::Vectorized<double> exp_nonpositive(at::vec::Vectorized<double> x) {
  return x.exp();
}


template <typename acc_t>
acc_t horizontal_sum(const at::vec::Vectorized<acc_t>& v) {
  return at::vec::vec_reduce_all<acc_t>([](const auto& a, const auto& b) { return a + b; }, v);
}

template <typename acc_t>
acc_t horizontal_max(const at::vec::Vectorized<acc_t>& v) {
  return at::vec::vec_reduce_all<acc_t>([](const auto& a, const auto& b) { return at::vec::maximum(a, b); }, v);
}

// Calls f(i, n) for the whole vectors of a block and, with n < width, for what is left at its end.
template <typename acc_t, typename F>
void for_each_vector(int64_t count, const F& f) {
  constexpr int64_t width = at::vec::Vectorized<acc_t>::size();
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    f(i, width);
  }
  if (i < count) {
    f(i, count - i);
  }
}

// The first `count` lanes of a vector from memory, the others `fill`.
template <typename acc_t>
at::vec::Vectorized<acc_t> load(const acc_t* data, int64_t count, acc_t fill) {
  using Vec = at::vec::Vectorized<acc_t>;
  return count == Vec::size() ? Vec::loadu(data) : Vec::set(Vec(fill), Vec::loadu(data, count), count);
}

}  // namespace lightkit::cpu
