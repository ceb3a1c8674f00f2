// The packing of weights: output or input channels become the lanes of vectors.
#pragma once

#include "shape.h"

namespace lightkit::cpu::layer_chain {

// Transposes [rows, taps], with rows `row_size` apart, to one vector a tap, whose lanes from `rows` on are 0. next()
// returns the place of the next vector.
template <typename T>
void pack_taps(const T* from, int64_t row_size, int64_t rows, int64_t taps, auto&& next) {
  constexpr int width = kWidth<T>;
  int64_t tap = 0;
  if (rows == width) {
    alignas(64) T square[width * width];
    for (; tap + width <= taps; tap += width) {
      at::vec::transpose_mxn<T, width, width>(from + tap, row_size, square, width);
      for (int64_t t = 0; t < width; ++t) {
        Vec<T>::loadu(square + t * width).store(next());
      }
    }
  }
  for (; tap < taps; ++tap) {
    T* const to = next();
    for (int64_t lane = 0; lane < width; ++lane) {
      to[lane] = lane < rows ? from[lane * row_size + tap] : T(0);
    }
  }
}

}  // namespace lightkit::cpu::layer_chain
