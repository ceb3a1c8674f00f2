// The sums of a register tile whose positions share their inputs: along a row, each input is multiplied with the
// weights of three taps. With few vectors of output channels, a tile is bound by loads of inputs otherwise.
#pragma once

#include "register_tile.h"

namespace lightkit::cpu::conv2d {

// sums[p] = initial[p] + the sum over the values i of the runs, and over the taps t = 0, 1, 2, of
// inputs[p + t][i] * weight[i][t].
//
// Static: the compiler then passes the arguments in registers.
template <typename T, int vectors, int step>
static void multiply_row_tile(
    const T* inputs,  // of the first position; those of the next one lie `step` values behind
    const Run* runs,
    const Run* runs_end,
    const T* weight,         // [values of the runs, 3, vectors, width]
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
    for (const T* const end = from + runs->length; from != end; ++from, weight += 3 * vectors * width) {
      Vec<T> w[3 * vectors];
      LIGHTKIT_UNROLL
      for (int i = 0; i < 3 * vectors; ++i) {
        w[i] = Vec<T>::loadu(weight + i * width);
      }
      LIGHTKIT_UNROLL
      for (int i = 0; i < (positions + 2) * 3 * vectors; ++i) {
        const int column = i / (3 * vectors);
        const int tap = i / vectors % 3;
        const int p = column - tap;
        if (p >= 0 && p < positions) {
          Vec<T>& to = sum[p * vectors + i % vectors];
          to = at::vec::fmadd(Vec<T>(from[column * step]), w[i % (3 * vectors)], to);
        }
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int i = 0; i < positions * vectors; ++i) {
    sum[i].store(sums + i / vectors * stride + i % vectors * width);
  }
}

}  // namespace lightkit::cpu::conv2d
