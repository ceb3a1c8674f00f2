// The tiles of Winograd's algorithm: 2x2 results of a 3x3 correlation, which read 4x4 values of the source.
#pragma once

#include "correlation.h"

#include <algorithm>
#include <array>

namespace lightkit::cpu::conv2d {

class TileCursor;

class TileGrid {
 public:
  // Returns true if the taps of a correlation of step 1 are those of a 3x3 kernel, side by side.
  static bool fits(const Correlation& c) {
    if (c.taps.size() != 9) {
      return false;
    }
    for (size_t t = 0; t < 9; ++t) {
      if (c.taps[t].row != c.taps[0].row + static_cast<int64_t>(t / 3) ||
          c.taps[t].column != c.taps[0].column + static_cast<int64_t>(t % 3)) {
        return false;
      }
    }
    return true;
  }

  explicit TileGrid(const Correlation& c)
      : rows_(ceil_div(c.rows, 2)),
        columns_(ceil_div(c.columns, 2)),
        tiles_(c.images * rows_ * columns_),
        result_rows_(c.rows),
        result_columns_(c.columns),
        source_rows_(c.source_rows),
        source_columns_(c.source_columns),
        first_row_(c.taps[0].row),
        first_column_(c.taps[0].column) {
    for (size_t t = 0; t < 9; ++t) {
      taps_[t] = c.taps[t].index;
    }
  }

  int64_t tiles() const {
    return tiles_;
  }
  // The place in the kernel of the tap that reads row t / 3 and column t % 3.
  int64_t tap(int t) const {
    return taps_[t];
  }
  // Returns the place of a value k of [9, channels] in the weights [channels, kernel size] of an output channel.
  int64_t place(int64_t k, int64_t channels, int64_t kernel_size) const {
    return k % channels * kernel_size + taps_[k / channels];
  }

  // Writes the places of the values of the source that a tile reads, and of its results. `zeros` takes the place of
  // those that do not exist.
  template <typename T>
  void place_inputs(const Images<const T>& source, const TileCursor& tile, const T* zeros, const T* (&at)[4][4]) const;
  template <typename T>
  void place_results(
      const Images<const T>& results, const TileCursor& tile, const T* zeros, const T* (&at)[2][2]) const;

 private:
  friend class TileCursor;
  int64_t rows_;
  int64_t columns_;
  int64_t tiles_;
  int64_t result_rows_;
  int64_t result_columns_;
  int64_t source_rows_;
  int64_t source_columns_;
  int64_t first_row_;
  int64_t first_column_;
  std::array<int64_t, 9> taps_;
};

// Walks over the tiles of all images.
class TileCursor {
 public:
  TileCursor(const TileGrid& grid, int64_t tile)
      : grid_(grid),
        image_(tile / (grid.rows_ * grid.columns_)),
        row_(tile / grid.columns_ % grid.rows_),
        column_(tile % grid.columns_) {}

  int64_t image() const {
    return image_;
  }
  int64_t row() const {
    return row_;
  }
  int64_t column() const {
    return column_;
  }
  void advance() {
    if (++column_ == grid_.columns_) {
      column_ = 0;
      if (++row_ == grid_.rows_) {
        row_ = 0;
        ++image_;
      }
    }
  }

 private:
  const TileGrid& grid_;
  int64_t image_;
  int64_t row_;
  int64_t column_;
};

// Writes the places of the values of `size` rows and columns from (y, x) on.
template <typename T, int size>
void place_square(
    const Images<const T>& images,
    int64_t n,
    int64_t y,
    int64_t x,
    int64_t rows,
    int64_t columns,
    const T* zeros,
    const T* (&at)[size][size]) {
  const bool is_inside = y >= 0 && x >= 0 && y + size <= rows && x + size <= columns;
  for (int64_t r = 0; r < size; ++r) {
    for (int64_t c = 0; c < size; ++c) {
      const bool exists = is_inside || (y + r >= 0 && y + r < rows && x + c >= 0 && x + c < columns);
      at[r][c] = exists ? images.at(n, y + r, x + c) : zeros;
    }
  }
}

template <typename T>
void TileGrid::place_inputs(
    const Images<const T>& source, const TileCursor& tile, const T* zeros, const T* (&at)[4][4]) const {
  const int64_t y = 2 * tile.row() + first_row_;
  const int64_t x = 2 * tile.column() + first_column_;
  place_square<T, 4>(source, tile.image(), y, x, source_rows_, source_columns_, zeros, at);
}

template <typename T>
void TileGrid::place_results(
    const Images<const T>& results, const TileCursor& tile, const T* zeros, const T* (&at)[2][2]) const {
  place_square<T, 2>(
      results, tile.image(), 2 * tile.row(), 2 * tile.column(), result_rows_, result_columns_, zeros, at);
}

}  // namespace lightkit::cpu::conv2d
