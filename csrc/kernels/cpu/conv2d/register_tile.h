// The sums of a register tile: some positions by some vectors of output channels.
#pragma once

#include "tuning.h"

#include <c10/util/Unroll.h>

#include <type_traits>

namespace lightkit::cpu::conv2d {

// Consecutive values of a position's inputs.
struct Run {
  int64_t offset;  // from the position
  int64_t length;
};

// sums = initial + the sum over all values of the runs of value * weight.
//
// Static: the compiler then passes the arguments in registers.
template <typename T, int vectors, int step>
static void multiply_tile(
    const T* inputs,  // of the first position; those of the next one lie `step` values behind
    const Run* runs,
    const Run* runs_end,
    const T* weight,         // [values of the runs, vectors, width]
    const T* initial,        // [positions, vectors, width], positions `initial_stride` apart
    int64_t initial_stride,  // 0 if all positions begin with the same
    T* sums,                 // [positions, vectors, width], positions `stride` apart
    int64_t stride) {
  constexpr int width = kWidth<T>;
  constexpr int positions = kPositions<vectors>;
  // Nested loops over sums of one vector each would leave the sums in memory.
  Vec<T> sum[positions * vectors];
  LIGHTKIT_UNROLL
  for (int i = 0; i < positions * vectors; ++i) {
    sum[i] = Vec<T>::loadu(initial + i / vectors * initial_stride + i % vectors * width);
  }
  for (; runs != runs_end; ++runs) {
    const T* from = inputs + runs->offset;
    for (const T* const end = from + runs->length; from != end; ++from, weight += vectors * width) {
      Vec<T> w[vectors];
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        w[v] = Vec<T>::loadu(weight + v * width);
      }
      LIGHTKIT_UNROLL
      for (int i = 0; i < positions * vectors; ++i) {
        sum[i] = at::vec::fmadd(Vec<T>(from[i / vectors * step]), w[i % vectors], sum[i]);
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int i = 0; i < positions * vectors; ++i) {
    sum[i].store(sums + i / vectors * stride + i % vectors * width);
  }
}

// The results of a tile: `count` positions, `stride` apart, of `channels` channels.
template <typename T>
struct TileResults {
  T* data;
  int64_t stride;
  int64_t count;
  int64_t channels;
};

// Calls f(initial, initial_stride, sums, stride) for a tile of results: with `first`, it begins with the vectors of the
// bias, else with the results. A tile that has fewer positions or channels goes through a buffer.
template <typename T, int vectors, typename F>
void with_whole_tile(const TileResults<T>& results, const T* bias, bool first, const F& f) {
  constexpr int lanes = vectors * kWidth<T>;
  constexpr int positions = kPositions<vectors>;
  if (results.count == positions && results.channels == lanes) {
    f(first ? bias : results.data, first ? 0 : results.stride, results.data, results.stride);
    return;
  }
  alignas(64) T buffer[positions * lanes];
  if (!first) {
    std::fill_n(buffer, positions * lanes, T(0));
    for (int64_t p = 0; p < results.count; ++p) {
      std::copy_n(results.data + p * results.stride, results.channels, buffer + p * lanes);
    }
  }
  f(first ? bias : buffer, first ? 0 : lanes, static_cast<T*>(buffer), int64_t(lanes));
  for (int64_t p = 0; p < results.count; ++p) {
    std::copy_n(buffer + p * lanes, results.channels, results.data + p * results.stride);
  }
}

// Calls f(n) with `value`, from 1 to `most`, as a compile-time constant.
template <int most, typename F>
void with_constant(int64_t value, const F& f) {
  c10::ForcedUnroll<most>{}([&](auto i) {
    if (value == i + 1) {
      f(std::integral_constant<int, i + 1>{});
    }
  });
}

// Vectors of channels in blocks of at most `most`, of about the same size.
struct VectorBlocks {
  int64_t vectors;
  int64_t blocks;

  VectorBlocks(int64_t vectors, int64_t most) : vectors(vectors), blocks(ceil_div(vectors, most)) {}

  // The first vector of a block.
  int64_t begin(int64_t block) const {
    return block * vectors / blocks;
  }
  int64_t size(int64_t block) const {
    return begin(block + 1) - begin(block);
  }
};

}  // namespace lightkit::cpu::conv2d
