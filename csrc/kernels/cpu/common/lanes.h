// Vectors as the compiler's own types, for comparisons, selections, integers and parts of vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lightkit::cpu {

// A vector of integers that is as wide as the processor's registers. A lane of Words64 may hold a word of 32 bits in
// its low half.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kVectorBytes = 64;
#else
inline constexpr int kVectorBytes = 32;
#endif
typedef uint32_t Words32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words64 __attribute__((vector_size(kVectorBytes)));
inline constexpr int kWords32 = kVectorBytes / sizeof(uint32_t);
inline constexpr int kWords64 = kVectorBytes / sizeof(uint64_t);

// Returns the 64-bit products of the low halves of the lanes. The compiler does not find this instruction in a product
// of masked lanes.
inline Words64 multiply_low_halves(const Words64& a, const Words64& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return reinterpret_cast<Words64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret_cast<Words64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  constexpr uint64_t low_half = 0xffffffff;
  return (a & low_half) * (b & low_half);
#endif
}

// A vector as the compiler's own type, with one integer and one byte a lane. The compiler selects lanes with mask
// registers where the processor has them, while at::vec makes vectors of comparisons.
template <typename T>
struct LaneTypes {
  static constexpr int count = at::vec::Vectorized<T>::size();
  using Number = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T values __attribute__((vector_size(count * sizeof(T))));
  typedef Number numbers __attribute__((vector_size(count * sizeof(Number))));
  typedef uint8_t bytes __attribute__((vector_size(count)));
};
template <typename T>
using Lanes = typename LaneTypes<T>::values;
template <typename T>
using LaneNumbers = typename LaneTypes<T>::numbers;
template <typename T>
using LaneBytes = typename LaneTypes<T>::bytes;

// True for vectors whose first lanes the processor loads and stores by a mask.
template <typename L, typename T>
inline constexpr bool has_masks = sizeof(L) == kVectorBytes && (sizeof(T) == 4 || sizeof(T) == 8);

#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
// A mask of the first `count` lanes of 4 or 8 bytes.
template <typename T>
__m256i first_lanes(int64_t count) {
  if constexpr (sizeof(T) == 8) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  } else {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
}
#endif

// Loads `count` elements; the other lanes are 0.
template <typename L, typename T>
L load_lanes(const T* data, int64_t count = sizeof(L) / sizeof(T)) {
  L lanes{};
  if (count == sizeof(L) / sizeof(T)) {
    std::memcpy(&lanes, data, sizeof(L));
    return lanes;
  }
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (has_masks<L, T>) {
    if constexpr (sizeof(T) == 8) {
      return reinterpret_cast<L>(_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << count) - 1), data));
    } else {
      return reinterpret_cast<L>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), data));
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (has_masks<L, T>) {
    if constexpr (sizeof(T) == 8) {
      return reinterpret_cast<L>(
          _mm256_maskload_epi64(reinterpret_cast<const long long*>(data), first_lanes<T>(count)));
    } else {
      return reinterpret_cast<L>(_mm256_maskload_epi32(reinterpret_cast<const int*>(data), first_lanes<T>(count)));
    }
  }
#endif
  std::memcpy(&lanes, data, count * sizeof(T));
  return lanes;
}

// Copies `count` bytes, at most 64: two parts of a size that the compiler knows, which may overlap. memcpy would be
// called, because the compiler does not know `count`.
inline void store_bytes(const void* from, void* to, size_t count) {
  const auto copy = [&](auto size) {
    const size_t last = count - size;
    char parts[2][size];
    std::memcpy(parts[0], from, size);
    std::memcpy(parts[1], static_cast<const char*>(from) + last, size);
    std::memcpy(to, parts[0], size);
    std::memcpy(static_cast<char*>(to) + last, parts[1], size);
  };
  if (count >= 32) {
    copy(std::integral_constant<size_t, 32>{});
  } else if (count >= 16) {
    copy(std::integral_constant<size_t, 16>{});
  } else if (count >= 8) {
    copy(std::integral_constant<size_t, 8>{});
  } else if (count >= 4) {
    copy(std::integral_constant<size_t, 4>{});
  } else if (count >= 2) {
    copy(std::integral_constant<size_t, 2>{});
  } else if (count == 1) {
    copy(std::integral_constant<size_t, 1>{});
  }
}

// Stores the first `count` elements.
template <typename L, typename T>
void store_lanes(const L& lanes, T* data, int64_t count) {
  if (count == sizeof(L) / sizeof(T)) {
    std::memcpy(data, &lanes, sizeof(L));
    return;
  }
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (has_masks<L, T>) {
    if constexpr (sizeof(T) == 8) {
      _mm512_mask_storeu_epi64(data, static_cast<__mmask8>((1u << count) - 1), reinterpret_cast<__m512i>(lanes));
    } else {
      _mm512_mask_storeu_epi32(data, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512i>(lanes));
    }
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (has_masks<L, T>) {
    const __m256i mask = first_lanes<T>(count);
    if constexpr (sizeof(T) == 8) {
      _mm256_maskstore_epi64(reinterpret_cast<long long*>(data), mask, reinterpret_cast<__m256i>(lanes));
    } else {
      _mm256_maskstore_epi32(reinterpret_cast<int*>(data), mask, reinterpret_cast<__m256i>(lanes));
    }
    return;
  }
#endif
  store_bytes(&lanes, data, count * sizeof(T));
}

// Returns a bit for each lane, the first lane's lowest: 1 if the value is not 0. NaN is not 0.
template <typename T>
uint32_t nonzero_lanes(const Lanes<T>& values) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 8) {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(values), _mm512_setzero_pd(), _CMP_NEQ_UQ);
  } else {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(values), _mm512_setzero_ps(), _CMP_NEQ_UQ);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  const auto nonzero = values != Lanes<T>{};
  if constexpr (sizeof(T) == 8) {
    return _mm256_movemask_pd(reinterpret_cast<__m256d>(nonzero));
  } else {
    return _mm256_movemask_ps(reinterpret_cast<__m256>(nonzero));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < LaneTypes<T>::count; ++i) {
    bits |= static_cast<uint32_t>(values[i] != 0) << i;
  }
  return bits;
#endif
}

// Returns the values of the lanes whose bit is 1, and 0 in the others. Higher bits are ignored.
template <typename T>
Lanes<T> keep_lanes(const Lanes<T>& values, uint64_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<Lanes<T>>(
        _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), reinterpret_cast<__m512d>(values)));
  } else {
    return reinterpret_cast<Lanes<T>>(
        _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(values)));
  }
#else
  using Number = typename LaneTypes<T>::Number;
  LaneNumbers<T> bit_of_lane;
  for (int i = 0; i < LaneTypes<T>::count; ++i) {
    bit_of_lane[i] = Number(1) << i;
  }
  const auto is_set = ((LaneNumbers<T>{} + static_cast<Number>(bits)) & bit_of_lane) != LaneNumbers<T>{};
  return is_set ? values : Lanes<T>{};
#endif
}

template <typename T>
at::vec::Vectorized<T> vectorized(const Lanes<T>& lanes) {
  return at::vec::Vectorized<T>::loadu(&lanes);
}

template <typename T>
Lanes<T> lanes(const at::vec::Vectorized<T>& vector) {
  Lanes<T> lanes;
  vector.store(&lanes);
  return lanes;
}

}  // namespace lightkit::cpu
