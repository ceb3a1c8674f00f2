// Winograd's F(2, 3) over the rows of a 3x3 correlation of step 1: two rows of results from four rows of the source, by
// 4 instead of 6 one-dimensional correlations. It takes any number of channels. (Winograd, "Arithmetic Complexity of
// Computations", 1980.)
#pragma once

#include "planes.h"
#include "tile_cursor.h"

namespace lightkit::cpu::conv2d::row_winograd {

// Points of four rows in the transformed domain.
inline constexpr int kPoints = 4;

// The transformed source of a band, [kPoints, vectors of channels, pairs of rows, columns, pixel].
template <typename T>
class TransformedBand {
 public:
  explicit TransformedBand(const Planes<T>& planes)
      : planes_(planes),
        row_(round_up(planes.row_size(), kWidth<T>)),
        vector_(planes.band_rows() / 2 * row_),
        point_(planes.vectors() * vector_) {}

  // Register tiles read up to kMaxPositions pixels beyond the last one.
  int64_t size() const {
    return kPoints * point_ + (kMaxPositions + 2) * planes_.pixel();
  }
  int64_t row() const {
    return row_;
  }
  int64_t vector() const {
    return vector_;
  }
  int64_t point() const {
    return point_;
  }

  // Transforms the first `pairs` pairs of rows of filled planes.
  void fill(const T* planes, int64_t pairs, T* to) const {
    // The stores of a loop could change what lies behind a pointer, so that it would read sizes again and again.
    const int64_t size = planes_.row_size();
    const int64_t point = point_;
    for (int64_t v = 0; v < planes_.vectors(); ++v) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const T* from = planes + v * planes_.vector_size() + 2 * pair * size;
        T* place = to + v * vector_ + pair * row_;
        for (const T* const end = from + size; from < end; from += kWidth<T>, place += kWidth<T>) {
          const Vec<T> d0 = Vec<T>::loadu(from);
          const Vec<T> d1 = Vec<T>::loadu(from + size);
          const Vec<T> d2 = Vec<T>::loadu(from + 2 * size);
          const Vec<T> d3 = Vec<T>::loadu(from + 3 * size);
          (d0 - d2).store(place);
          (d1 + d2).store(place + point);
          (d2 - d1).store(place + 2 * point);
          (d1 - d3).store(place + 3 * point);
        }
      }
    }
  }

 private:
  const Planes<T>& planes_;
  const int64_t row_;
  const int64_t vector_;
  const int64_t point_;
};

}  // namespace lightkit::cpu::conv2d::row_winograd
