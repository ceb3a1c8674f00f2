// Lists of the live outputs, made without a branch that depends on the data, which would be mispredicted all the time.
#pragma once

#include "conv_relu_pool.h"

#include <c10/util/Unroll.h>

#include <array>
#include <bit>
#include <type_traits>
#include <vector>

namespace lightkit::cpu {

// Vectors of a patch that registers hold beside a coefficient and what it multiplies.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kHeld = 24;
#else
inline constexpr int kHeld = 12;
#endif

// What make(rows, columns) gives for two numbers that are known when compiled: up to so many rows and columns.
template <int most_rows, int most_columns, typename Make>
auto with_sizes(int64_t rows, int64_t columns, const Make& make) {
  decltype(make(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{})) found = nullptr;
  c10::ForcedUnroll<most_rows>{}([&](auto r) {
    c10::ForcedUnroll<most_columns>{}([&](auto c) {
      if (rows == r + 1 && columns == c + 1) {
        found = make(std::integral_constant<int, r + 1>{}, std::integral_constant<int, c + 1>{});
      }
    });
  });
  return found;
}

// What one sum adds up: coefficient times what lies at the offset, for each of `size`.
template <typename T>
struct List {
  int32_t* offsets;
  T* coefficients;
  int64_t size;

  // Counted only if it is live: what is not is overwritten by the next.
  void append(int64_t offset, T coefficient, bool live) {
    offsets[size] = static_cast<int32_t>(offset);
    coefficients[size] = coefficient;
    size += live;
  }

#if defined(CPU_CAPABILITY_AVX512)
  // Of sixteen, those of the mask.
  void append(__m512i offset, __m512 coefficient, __mmask16 live) requires std::is_same_v<T, float> {
    _mm512_storeu_si512(offsets + size, _mm512_maskz_compress_epi32(live, offset));
    _mm512_storeu_ps(coefficients + size, _mm512_maskz_compress_ps(live, coefficient));
    size += std::popcount(static_cast<unsigned>(live));
  }
#endif
};

// One list for each of `count` receivers.
template <typename T>
class Lists {
 public:
  Lists(int64_t count, int64_t capacity)
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
  List<T>* data() {
    return lists_.data();
  }
  const List<T>* data() const {
    return lists_.data();
  }

 private:
  // What an append writes beyond the end.
  static constexpr int64_t kSpare = 16;

  const int64_t stride_;
  AlignedBuffer<int32_t> offsets_;
  AlignedBuffer<T> coefficients_;
  std::vector<List<T>> lists_;
};

// One output, whose channels are listed by the position that won: in `quads` lists, with c * stride for channel c.
template <typename T, int quads>
void list_channels(
    List<T>* lists, const T* gradients, const uint8_t* winners, int64_t channels, int64_t stride) {
  int64_t c = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512i step = _mm512_set1_epi32(static_cast<int>(16 * stride));
    __m512i offset = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(static_cast<int>(stride)));
    for (; c + 16 <= channels; c += 16, offset = _mm512_add_epi32(offset, step)) {
      const __m512 gradient = _mm512_loadu_ps(gradients + c);
      const __m512i winner =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(winners + c)));
      LIGHTKIT_UNROLL for (int q = 0; q < quads; ++q) {
        lists[q].append(offset, gradient, _mm512_cmpeq_epi32_mask(winner, _mm512_set1_epi32(q)));
      }
    }
  }
#endif
  for (; c < channels; ++c) {
    lists[winners[c] & (quads - 1)].append(c * stride, gradients[c], winners[c] != kDead);
  }
}

// How far the position that won lies from the first, by its number.
using Moves = std::array<int32_t, 8>;

// `count` outputs, listed by channel: each with its place in `places`, moved by that of the position that won.
// Gradients and winners are `stride` from output to output.
template <typename T, int channels>
void list_outputs(
    List<T>* lists,
    const T* gradients,
    const uint8_t* winners,
    int64_t stride,
    const int32_t* places,
    const Moves& moves,
    int64_t count) {
  int64_t o = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float> && channels % 4 == 0) {
    const __m512i table = _mm512_setr_epi32(moves[0], moves[1], moves[2], moves[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(static_cast<int>(stride)));
    for (; o < count; o += 16) {
      const __mmask16 there = count - o >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - o)) - 1);
      const __m512i place = _mm512_maskz_loadu_epi32(there, places + o);
      LIGHTKIT_UNROLL for (int c = 0; c < channels; c += 4) {
        // Four winners at once.
        __m512i winner = _mm512_mask_i32gather_epi32(
            _mm512_set1_epi32(-1), there, rows, winners + o * stride + c, 1);
        LIGHTKIT_UNROLL for (int i = 0; i < 4; ++i, winner = _mm512_srli_epi32(winner, 8)) {
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
    LIGHTKIT_UNROLL for (int c = 0; c < channels; ++c) {
      const uint8_t winner = winners[o * stride + c];
      lists[c].append(places[o] + moves[winner & 7], gradients[o * stride + c], winner != kDead);
    }
  }
}

}  // namespace lightkit::cpu
