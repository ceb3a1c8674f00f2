// Vectors of 16 lanes: 32-bit sums of products of 8-bit integers, and floats.
//
// A lane of `Weights` has four signed bytes, and `Inputs` has four unsigned bytes, the same in each lane. The product
// of a lane is the exact sum of the four products. vpdpbusd of VNNI computes it. vpmaddubsw, its predecessor, saturates
// at 16 bits, so that processors without VNNI multiply the even and the odd bytes as 16-bit integers.
#pragma once

#include "../common/lanes.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lightkit::cpu::int8_chain {

inline constexpr int64_t kLanes = 16;

// The bytes of the weights of a vector, four for each lane.
inline constexpr int64_t kWeightBytes = 4 * kLanes;

#if defined(CPU_CAPABILITY_AVX512)

// The type of the instructions' own lanes: with __m512i, whose lanes are of 64 bits, the compiler copies the sums.
typedef int32_t Lanes512 __attribute__((vector_size(64)));

struct Sums {
  Lanes512 v;

  Sums() = default;
  Sums(__m512i lanes) : v(reinterpret_cast<Lanes512>(lanes)) {}
  operator __m512i() const {
    return reinterpret_cast<__m512i>(v);
  }
};
struct Floats {
  __m512 v;
};

inline __mmask16 lane_mask(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}
inline Sums load_sums(const int32_t* data) {
  return {_mm512_loadu_si512(data)};
}
inline Sums maximum(Sums a, Sums b) {
  return {_mm512_max_epi32(a, b)};
}
inline Sums add(Sums a, int32_t b) {
  return {_mm512_add_epi32(a, _mm512_set1_epi32(b))};
}
inline Floats to_float(Sums a) {
  return {_mm512_cvtepi32_ps(a)};
}
// Rounds to the nearest even integer.
inline Sums to_integer(Floats a) {
  return {_mm512_cvtps_epi32(a.v)};
}
inline Floats load_floats(const float* data, int64_t count = kLanes) {
  return {count == kLanes ? _mm512_loadu_ps(data) : _mm512_maskz_loadu_ps(lane_mask(count), data)};
}
inline Floats multiply(Floats a, Floats b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline Floats multiply(Floats a, float b) {
  return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))};
}
// Returns `bound` for NaN.
inline Floats at_least(Floats a, float bound) {
  return {_mm512_max_ps(a.v, _mm512_set1_ps(bound))};
}
inline Floats at_most(Floats a, float bound) {
  return {_mm512_min_ps(a.v, _mm512_set1_ps(bound))};
}
inline void store(Floats a, float* data, int64_t count = kLanes) {
  if (count == kLanes) {
    _mm512_storeu_ps(data, a.v);
  } else {
    _mm512_mask_storeu_ps(data, lane_mask(count), a.v);
  }
}
// Stores the low bytes.
inline void store(Sums a, uint8_t* data, int64_t count = kLanes) {
  const __m128i bytes = _mm512_cvtepi32_epi8(a);
  if (count == kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), bytes);
  } else {
    _mm_mask_storeu_epi8(data, lane_mask(count), bytes);
  }
}

inline __m512i broadcast(const uint8_t* data) {
  int32_t four;
  std::memcpy(&four, data, sizeof(four));
  return _mm512_set1_epi32(four);
}

#if defined(__AVX512VNNI__)

using Inputs = Sums;
using Weights = Sums;

inline Inputs load_inputs(const uint8_t* data) {
  return {broadcast(data)};
}
inline Weights load_weights(const int8_t* data) {
  return {_mm512_loadu_si512(data)};
}
inline Sums add_products(Sums sums, Inputs inputs, Weights weights) {
  return {_mm512_dpbusd_epi32(sums, inputs, weights)};
}

#else

struct Inputs {
  __m512i even, odd;
};
using Weights = Inputs;

inline Inputs load_inputs(const uint8_t* data) {
  const __m512i four = broadcast(data);
  return {_mm512_and_si512(four, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(four, 8)};
}
inline Weights load_weights(const int8_t* data) {
  const __m512i bytes = _mm512_loadu_si512(data);
  return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
}
inline Sums add_products(Sums sums, Inputs inputs, Weights weights) {
  const __m512i even = _mm512_madd_epi16(inputs.even, weights.even);
  const __m512i odd = _mm512_madd_epi16(inputs.odd, weights.odd);
  return {_mm512_add_epi32(_mm512_add_epi32(sums, even), odd)};
}

#endif

#elif defined(CPU_CAPABILITY_AVX2)

// The type of the instructions' own lanes: with __m256i, whose lanes are of 64 bits, the compiler copies the sums.
typedef int32_t Lanes256 __attribute__((vector_size(32)));

struct Half {
  Lanes256 v;

  Half() = default;
  Half(__m256i lanes) : v(reinterpret_cast<Lanes256>(lanes)) {}
  operator __m256i() const {
    return reinterpret_cast<__m256i>(v);
  }
};

struct Sums {
  Half low, high;
};
struct Floats {
  __m256 low, high;
};

inline __m256i load_256(const void* data) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(data));
}
inline Sums load_sums(const int32_t* data) {
  return {load_256(data), load_256(data + 8)};
}
inline Sums maximum(Sums a, Sums b) {
  return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}
inline Sums add(Sums a, int32_t b) {
  const __m256i both = _mm256_set1_epi32(b);
  return {_mm256_add_epi32(a.low, both), _mm256_add_epi32(a.high, both)};
}
inline Floats to_float(Sums a) {
  return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
// Rounds to the nearest even integer.
inline Sums to_integer(Floats a) {
  return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)};
}
inline Floats load_floats(const float* data, int64_t count = kLanes) {
  float lanes[kLanes] = {};
  if (count < kLanes) {
    std::memcpy(lanes, data, count * sizeof(float));
    data = lanes;
  }
  return {_mm256_loadu_ps(data), _mm256_loadu_ps(data + 8)};
}
inline Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats multiply(Floats a, float b) {
  const __m256 both = _mm256_set1_ps(b);
  return multiply(a, Floats{both, both});
}
// Returns `bound` for NaN.
inline Floats at_least(Floats a, float bound) {
  const __m256 both = _mm256_set1_ps(bound);
  return {_mm256_max_ps(a.low, both), _mm256_max_ps(a.high, both)};
}
inline Floats at_most(Floats a, float bound) {
  const __m256 both = _mm256_set1_ps(bound);
  return {_mm256_min_ps(a.low, both), _mm256_min_ps(a.high, both)};
}
inline void store(Floats a, float* data, int64_t count = kLanes) {
  if (count == kLanes) {
    _mm256_storeu_ps(data, a.low);
    _mm256_storeu_ps(data + 8, a.high);
  } else {
    store_bytes(&a, data, count * sizeof(float));
  }
}
// Stores the low bytes of integers from 0 to 255.
inline void store(Sums a, uint8_t* data, int64_t count = kLanes) {
  // The packs work on halves of a vector: the words are those of lanes 0-3, 8-11, 4-7, 12-15.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (count == kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), bytes);
  } else {
    store_bytes(&bytes, data, count);
  }
}

inline __m256i broadcast(const uint8_t* data) {
  int32_t four;
  std::memcpy(&four, data, sizeof(four));
  return _mm256_set1_epi32(four);
}

#if defined(__AVXVNNI__)

struct Inputs {
  __m256i four;
};
using Weights = Sums;

inline Inputs load_inputs(const uint8_t* data) {
  return {broadcast(data)};
}
inline Weights load_weights(const int8_t* data) {
  return {load_256(data), load_256(data + 32)};
}
inline Sums add_products(Sums sums, Inputs inputs, Weights weights) {
  return {
      _mm256_dpbusd_avx_epi32(sums.low, inputs.four, weights.low),
      _mm256_dpbusd_avx_epi32(sums.high, inputs.four, weights.high)};
}

#else

struct Inputs {
  __m256i even, odd;
};
struct Weights {
  Inputs low, high;
};

inline Inputs load_inputs(const uint8_t* data) {
  const __m256i four = broadcast(data);
  return {_mm256_and_si256(four, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(four, 8)};
}
inline Inputs sign_extended(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Weights load_weights(const int8_t* data) {
  return {sign_extended(load_256(data)), sign_extended(load_256(data + 32))};
}
inline Sums add_products(Sums sums, Inputs inputs, Weights weights) {
  const auto add_half = [&](__m256i half, const Inputs& w) {
    const __m256i even = _mm256_madd_epi16(inputs.even, w.even);
    return _mm256_add_epi32(_mm256_add_epi32(half, even), _mm256_madd_epi16(inputs.odd, w.odd));
  };
  return {add_half(sums.low, weights.low), add_half(sums.high, weights.high)};
}

#endif

#else

// Sums wrap, as those of the vector instructions do.
struct Sums {
  uint32_t v[kLanes];
};
struct Floats {
  float v[kLanes];
};
struct Inputs {
  uint8_t v[4];
};
struct Weights {
  int8_t v[kWeightBytes];
};

// Applies a function to each lane.
template <typename Result, typename Function>
Result each(const Function& function) {
  Result result;
  for (int64_t i = 0; i < kLanes; ++i) {
    result.v[i] = function(i);
  }
  return result;
}
inline Sums load_sums(const int32_t* data) {
  return each<Sums>([&](int64_t i) { return static_cast<uint32_t>(data[i]); });
}
inline Sums maximum(const Sums& a, const Sums& b) {
  return each<Sums>(
      [&](int64_t i) { return static_cast<int32_t>(a.v[i]) > static_cast<int32_t>(b.v[i]) ? a.v[i] : b.v[i]; });
}
inline Sums add(const Sums& a, int32_t b) {
  return each<Sums>([&](int64_t i) { return a.v[i] + static_cast<uint32_t>(b); });
}
inline Floats to_float(const Sums& a) {
  return each<Floats>([&](int64_t i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}
// Rounds to the nearest even integer.
inline Sums to_integer(const Floats& a) {
  return each<Sums>([&](int64_t i) { return static_cast<uint32_t>(static_cast<int32_t>(std::nearbyint(a.v[i]))); });
}
inline Floats load_floats(const float* data, int64_t count = kLanes) {
  return each<Floats>([&](int64_t i) { return i < count ? data[i] : 0; });
}
inline Floats multiply(const Floats& a, const Floats& b) {
  return each<Floats>([&](int64_t i) { return a.v[i] * b.v[i]; });
}
inline Floats multiply(const Floats& a, float b) {
  return each<Floats>([&](int64_t i) { return a.v[i] * b; });
}
// Returns `bound` for NaN.
inline Floats at_least(const Floats& a, float bound) {
  return each<Floats>([&](int64_t i) { return a.v[i] > bound ? a.v[i] : bound; });
}
inline Floats at_most(const Floats& a, float bound) {
  return each<Floats>([&](int64_t i) { return a.v[i] < bound ? a.v[i] : bound; });
}
inline void store(const Floats& a, float* data, int64_t count = kLanes) {
  std::memcpy(data, a.v, count * sizeof(float));
}
// Stores the low bytes.
inline void store(const Sums& a, uint8_t* data, int64_t count = kLanes) {
  for (int64_t i = 0; i < count; ++i) {
    data[i] = static_cast<uint8_t>(a.v[i]);
  }
}

inline Inputs load_inputs(const uint8_t* data) {
  Inputs inputs;
  std::memcpy(inputs.v, data, sizeof(inputs.v));
  return inputs;
}
inline Weights load_weights(const int8_t* data) {
  Weights weights;
  std::memcpy(weights.v, data, sizeof(weights.v));
  return weights;
}
inline Sums add_products(const Sums& sums, const Inputs& inputs, const Weights& weights) {
  return each<Sums>([&](int64_t i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < 4; ++k) {
      sum += int32_t(inputs.v[k]) * weights.v[4 * i + k];
    }
    return sums.v[i] + static_cast<uint32_t>(sum);
  });
}

#endif

// Rounds y to the nearest even integer, adds the zero point and clamps to [least, 255]; `least` is 0, or the zero point
// behind a ReLU. NaN becomes `least`. Clamping before rounding is the same, because the bounds are integers, and keeps
// the conversion in its range.
inline Sums quantized(Floats y, int32_t zero_point, int32_t least) {
  const auto low = static_cast<float>(least - zero_point);
  const auto high = static_cast<float>(255 - zero_point);
  return add(to_integer(at_most(at_least(y, low), high)), zero_point);
}

}  // namespace lightkit::cpu::int8_chain
