// The gradient of a weight, summed in parts: each thread sums some parts, which are then added in a fixed order.
#pragma once

#include "../common/aligned_buffer.h"
#include "../common/pieces.h"
#include "register_tile.h"

#include <functional>

namespace lightkit::cpu::conv2d {

// Returns the number of parts, which depends on the problem alone.
inline int64_t count_parts(int64_t positions, int64_t items) {
  return std::clamp<int64_t>(positions / kPartPositions, 1, std::min(kMaxParts, items));
}

// Adds the parts, and writes the sums: row k and output channel o go to `to[o * stride + place(k)]`.
template <typename T>
void add_parts(
    const T* parts,  // [count, rows, lanes], parts `part_rows` rows apart
    int64_t count,
    int64_t rows,
    int64_t part_rows,
    int64_t lanes,  // whole vectors
    int64_t channels,
    T* to,
    int64_t stride,
    const std::function<int64_t(int64_t)>& place) {
  constexpr int width = kWidth<T>;
  // A piece is as many rows as fill a vector.
  in_pieces(rows, width, kPackingMacs * count * rows * lanes / width, [&](int64_t begin, int64_t end) {
    alignas(64) T sums[width];
    for (int64_t lane = 0; lane < lanes; lane += width) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = parts + row * lanes + lane;
        Vec<T> sum = Vec<T>::loadu(from);
        for (int64_t p = 1; p < count; ++p) {
          sum = sum + Vec<T>::loadu(from + p * part_rows * lanes);
        }
        sum.store(sums);
        T* const column = to + place(row);
        for (int64_t o = lane; o < std::min<int64_t>(channels, lane + width); ++o) {
          column[o * stride] = sums[o - lane];
        }
      }
    }
  });
}

}  // namespace lightkit::cpu::conv2d
