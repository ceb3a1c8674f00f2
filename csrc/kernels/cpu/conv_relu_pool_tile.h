// What the ways to the forward pass share: the sums of a tile in registers, and what ReLU and pool make of sums.
#pragma once

#include "conv_relu_pool.h"

#include <c10/util/Unroll.h>

#include <type_traits>

namespace lightkit::cpu {

// A tile is kPositions positions by kVectors vectors of output channels, all of whose sums stay in registers: for each
// input that a position reads, one broadcast and kVectors multiply-adds. Sums, weights and one broadcast fit the 32
// registers of AVX-512 or the 16 of AVX2.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = 2;
#endif
inline constexpr int kPositions = 6;

// sums[p] = bias + the products of one position; weights lie as (kernel_height, run, vectors). Static: to a
// function that is nobody else's the compiler hands the inputs in registers.
template <typename T, int vectors>
static void convolve(
    const ConvReluPoolShape& shape, const T* const (&inputs)[kPositions], const T* weight, const T* bias, T* sums) {
  constexpr int width = kWidth<T>;
  const int64_t run = shape.run();
  const int64_t row_size = shape.row_size();
  const T* x[kPositions];
  std::copy_n(inputs, kPositions, x);
  Vec<T> sum[kPositions][vectors];
  LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      sum[p][v] = Vec<T>::loadu(bias + v * width);
    }
  }
  for (int64_t row = 0; row < shape.kernel_height; ++row) {
    for (int64_t i = 0; i < run; ++i) {
      Vec<T> w[vectors];
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        w[v] = Vec<T>::loadu(weight + v * width);
      }
      weight += vectors * width;
      LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
        const Vec<T> value(x[p][i]);
        LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
          sum[p][v] = at::vec::fmadd(value, w[v], sum[p][v]);
        }
      }
    }
    LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
      x[p] += row_size;
    }
  }
  LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      sum[p][v].store(sums + (p * vectors + v) * width);
    }
  }
}

// ReLU, if there is one, and the pool over `quads` positions, of one vector of channels; `stride` from position to
// position.
template <typename T, int quads>
void finish(const T* sums, int64_t stride, bool relu, T* output, uint8_t* index, int64_t count) {
  using Values = Lanes<T>;
  using Numbers = LaneNumbers<T>;
  Values best = load_lanes<Values>(sums);
  Numbers winner{};
  LIGHTKIT_UNROLL for (int q = 1; q < quads; ++q) {
    const Values value = load_lanes<Values>(sums + q * stride);
    // The second is for NaN.
    const auto wins = (value > best) | (value != value);
    best = wins ? value : best;
    winner = wins ? Numbers{} + q : winner;
  }
  // NaN is not below 0: it goes on.
  const auto dead = relu ? best <= Values{} : Numbers{};
  store_lanes(dead ? Values{} : best, output, count);
  if (index != nullptr) {
    store_lanes(__builtin_convertvector(dead ? Numbers{} + kDead : winner, LaneBytes<T>), index, count);
  }
}

// Calls f(n) with n, from 1 to kVectors, known when compiled.
template <typename F>
void with_vectors(int64_t vectors, const F& f) {
  c10::ForcedUnroll<kVectors>{}([&](auto v) {
    if (vectors == v + 1) {
      f(std::integral_constant<int, v + 1>{});
    }
  });
}

// The packed weight has the vectors of output channels in blocks of kVectors; the last may have fewer.
template <typename T>
int64_t ConvReluPoolForward<T>::blocks() const {
  return (vectors_ + kVectors - 1) / kVectors;
}

template <typename T>
int64_t ConvReluPoolForward<T>::vectors(int64_t block) const {
  return std::min<int64_t>(kVectors, vectors_ - block * kVectors);
}

}  // namespace lightkit::cpu
