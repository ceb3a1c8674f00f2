// Lists of the live outputs. They are made without branches that depend on the data, which the processor would
// mispredict.
#pragma once

#include "../common/aligned_buffer.h"
#include "shape.h"

#include <c10/util/Unroll.h>

#include <array>
#include <bit>
#include <type_traits>
#include <vector>

namespace lightkit::cpu::layer_chain {

// Returns make(rows, columns), with both as compile-time constants; null beyond `max_rows` and `max_columns`.
template <int max_rows, int max_columns, typename Make>
auto with_sizes(int64_t rows, int64_t columns, const Make& make) {
  decltype(make(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{})) found = nullptr;
  c10::ForcedUnroll<max_rows>{}([&](auto r) {
    c10::ForcedUnroll<max_columns>{}([&](auto c) {
      if (rows == r + 1 && columns == c + 1) {
        found = make(std::integral_constant<int, r + 1>{}, std::integral_constant<int, c + 1>{});
      }
    });
  });
  return found;
}

// The terms of one sum: coefficients[i] times the vector at offsets[i], for i < size.
template <typename T>
struct LiveList {
  int32_t* offsets;  // [capacity]
  T* coefficients;   // [capacity]
  int64_t size;

  // Writes one term and counts it only if it is live: the next term overwrites a dead one.
  void append(int64_t offset, T coefficient, bool live) {
    offsets[size] = static_cast<int32_t>(offset);
    coefficients[size] = coefficient;
    size += live;
  }

#if defined(CPU_CAPABILITY_AVX512)
  // Writes the live ones of sixteen terms.
  void append(__m512i offset, __m512 coefficient, __mmask16 live) requires std::is_same_v<T, float>
  {
    _mm512_storeu_si512(offsets + size, _mm512_maskz_compress_epi32(live, offset));
    _mm512_storeu_ps(coefficients + size, _mm512_maskz_compress_ps(live, coefficient));
    size += std::popcount(static_cast<unsigned>(live));
  }
#endif
};

// `count` lists of up to `capacity` terms.
template <typename T>
class LiveLists {
 public:
  LiveLists(int64_t count, int64_t capacity)
      : stride_(capacity + kSpare), offsets_(count * stride_), coefficients_(count * stride_), lists_(count) {
    for (int64_t list = 0; list < count; ++list) {
      lists_[list] = {offsets_.data() + list * stride_, coefficients_.data() + list * stride_, 0};
    }
  }

  void clear() {
    for (auto& list : lists_) {
      list.size = 0;
    }
  }
  LiveList<T>* data() {
    return lists_.data();
  }
  const LiveList<T>* data() const {
    return lists_.data();
  }

 private:
  // A vector append writes up to so many terms beyond the end.
  static constexpr int64_t kSpare = 16;

  const int64_t stride_;
  AlignedBuffer<int32_t> offsets_;
  AlignedBuffer<T> coefficients_;
  std::vector<LiveList<T>> lists_;
};

// Lists the channels of one output by their argmax: list p gets the channels whose position p won, each with the offset
// c * stride.
template <typename T, int window>
void list_channels(
    LiveList<T>* lists,     // [window]
    const T* gradients,     // [channels]
    const uint8_t* argmax,  // [channels]
    int64_t channels,
    int64_t stride) {
  int64_t c = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512i step = _mm512_set1_epi32(static_cast<int>(16 * stride));
    __m512i offset = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(static_cast<int>(stride)));
    for (; c + 16 <= channels; c += 16, offset = _mm512_add_epi32(offset, step)) {
      const __m512 gradient = _mm512_loadu_ps(gradients + c);
      const __m512i winner = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(argmax + c)));
      LIGHTKIT_UNROLL
      for (int q = 0; q < window; ++q) {
        lists[q].append(offset, gradient, _mm512_cmpeq_epi32_mask(winner, _mm512_set1_epi32(q)));
      }
    }
  }
#endif
  for (; c < channels; ++c) {
    lists[argmax[c] & (window - 1)].append(c * stride, gradients[c], argmax[c] != kDead);
  }
}

// The offset of each position of a window from the first, indexed by the argmax; padded for the dead and for no output.
using WindowOffsets = std::array<int32_t, 8>;

// Lists `count` outputs by channel: list c gets the outputs whose channel c is live, each with its place plus the
// offset of the position that won.
template <typename T, int channels>
void list_outputs(
    LiveList<T>* lists,     // [channels]
    const T* gradients,     // [count, channels], outputs `stride` apart
    const uint8_t* argmax,  // as `gradients`
    int64_t stride,
    const int32_t* places,  // [count]
    const WindowOffsets& window_offsets,
    int64_t count) {
  int64_t o = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float> && channels % 4 == 0) {
    const __m512i table = _mm512_setr_epi32(
        window_offsets[0], window_offsets[1], window_offsets[2], window_offsets[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(static_cast<int>(stride)));
    for (; o < count; o += 16) {
      const __mmask16 there = count - o >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - o)) - 1);
      const __m512i place = _mm512_maskz_loadu_epi32(there, places + o);
      LIGHTKIT_UNROLL
      for (int c = 0; c < channels; c += 4) {
        // The argmax of four channels at once.
        __m512i winner = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), there, rows, argmax + o * stride + c, 1);
        LIGHTKIT_UNROLL
        for (int i = 0; i < 4; ++i, winner = _mm512_srli_epi32(winner, 8)) {
          const __m512 gradient =
              _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, rows, gradients + o * stride + c + i, 4);
          const __m512i move = _mm512_permutexvar_epi32(winner, table);
          const __mmask16 live = _mm512_testn_epi32_mask(winner, _mm512_set1_epi32(kDead));
          lists[c + i].append(_mm512_add_epi32(place, move), gradient, live & there);
        }
      }
    }
  }
#endif
  for (; o < count; ++o) {
    LIGHTKIT_UNROLL
    for (int c = 0; c < channels; ++c) {
      const uint8_t winner = argmax[o * stride + c];
      lists[c].append(places[o] + window_offsets[winner & 7], gradients[o * stride + c], winner != kDead);
    }
  }
}

}  // namespace lightkit::cpu::layer_chain
