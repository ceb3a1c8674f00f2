// Vectors for the CPU kernels: accumulators wider than the data, packs, lanes, and an exp for softmax.
#pragma once

#include "lanes.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Unrolls a loop over an array of vectors early: otherwise the array stays in memory. (The lambdas of
// c10::ForcedUnroll leave it there, too.)
#if defined(__clang__)
#define LIGHTKIT_UNROLL _Pragma("unroll")
#else
#define LIGHTKIT_UNROLL _Pragma("GCC unroll 64")
#endif

namespace lightkit::cpu {

// The accumulation type: float for half precision, else the type itself.
template <typename scalar_t>
using accumulator_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
inline constexpr bool is_half = std::is_same_v<scalar_t, at::BFloat16> || std::is_same_v<scalar_t, at::Half>;

// The accumulators of one vector of scalar_t: one vector, or two for half precision.
template <typename scalar_t>
struct Pack {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr int64_t size = at::vec::Vectorized<scalar_t>::size();
  static constexpr int parts = static_cast<int>(size / Vec::size());
  std::array<Vec, parts> part;

  static Pack unpack(const at::vec::Vectorized<scalar_t>& packed) {
    if constexpr (parts == 1) {
      return {{packed}};
    } else {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(packed);
      return {{low, high}};
    }
  }

  // Loads `count` elements; the other lanes are 0.
  static Pack load(const scalar_t* data, int64_t count = size) {
    return unpack(at::vec::Vectorized<scalar_t>::loadu(data, count));
  }

  // Loads `count` elements; the other lanes are `fill`.
  static Pack load(const scalar_t* data, int64_t count, scalar_t fill) {
    if (count == size) {
      return load(data);
    }
    std::array<scalar_t, size> lanes;
    lanes.fill(fill);
    std::copy_n(data, count, lanes.data());
    return load(lanes.data());
  }

  at::vec::Vectorized<scalar_t> packed() const {
    if constexpr (parts == 1) {
      return part[0];
    } else {
      return at::vec::convert_from_float<scalar_t>(part[0], part[1]);
    }
  }

  void store(scalar_t* data, int64_t count = size) const {
    packed().store(data, static_cast<int>(count));
  }
};

// Stores a vector past the caches, for results that do not fit them: an ordinary store reads the line first. `data` is
// aligned to a vector. stream_fence() orders a thread's streamed stores before its later stores.
template <typename scalar_t>
void stream(const at::vec::Vectorized<scalar_t>& v, scalar_t* data) {
#if defined(CPU_CAPABILITY_AVX512)
  alignas(64) scalar_t lanes[at::vec::Vectorized<scalar_t>::size()];
  v.store(lanes);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(data), _mm512_load_si512(lanes));
#elif defined(CPU_CAPABILITY_AVX2)
  alignas(32) scalar_t lanes[at::vec::Vectorized<scalar_t>::size()];
  v.store(lanes);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(data), _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
#else
  v.store(data);
#endif
}

inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Returns `count` values as accumulators: `data` itself if the types agree, else `buffer` [count] after a conversion.
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

// Returns exp(x) for x <= 88, with a relative error below 2e-7; exactly 0 from -88 down; NaN for NaN.
//
// With x = n ln 2 + r and |r| <= ln(2) / 2, the result is a degree-5 minimax polynomial in r, times 2^n. Adding
// 1.5 * 2^23 + 127 rounds x / ln 2 to an integer and leaves n + 127 in the low bits of the sum; shifted by 23 they are
// the bits of 2^n, and 0 for the n of the clamp at -88, so that an underflow is 0 at no cost. ln 2 needs one part: its
// error counts only where n is large, and there the result is nearly 0.
inline at::vec::Vectorized<float> exp_bounded(at::vec::Vectorized<float> x) {
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

inline at::vec::Vectorized<double> exp_bounded(at::vec::Vectorized<double> x) {
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

// Loads `count` elements; the other lanes are `fill`.
template <typename acc_t>
at::vec::Vectorized<acc_t> load(const acc_t* data, int64_t count, acc_t fill) {
  using Vec = at::vec::Vectorized<acc_t>;
  return count == Vec::size() ? Vec::loadu(data) : Vec::set(Vec(fill), Vec::loadu(data, count), count);
}

}  // namespace lightkit::cpu
