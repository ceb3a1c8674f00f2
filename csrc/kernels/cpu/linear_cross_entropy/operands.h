// Operands of `tile_gemm` from matrices in memory: a tile is converted, transposed or paired only if it must be.
#pragma once

#include "../common/simd.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

namespace lightkit::cpu::linear_cross_entropy {

// A row-major matrix in memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;  // elements from row to row

  Matrix at(int64_t row, int64_t column) const {
    return {data + row * stride + column, stride};
  }
};

// to [columns, rows] = from [rows, columns]^T
template <typename T>
void transpose(Matrix<const T> from, int64_t rows, int64_t columns, Matrix<T> to) {
  // at::vec transposes a block of this side in registers.
  constexpr int side = sizeof(T) == 2 ? 32 : 16;
  for (int64_t i = 0; i < rows; i += side) {
    for (int64_t j = 0; j < columns; j += side) {
      const Matrix<const T> block = from.at(i, j);
      const Matrix<T> place = to.at(j, i);
      if (rows - i >= side && columns - j >= side) {
        at::vec::transpose_mxn<T>(block.data, block.stride, place.data, place.stride, side, side);
        continue;
      }
      // Not with at::vec, whose mask of 31 elements overflows.
      for (int64_t r = 0; r < std::min<int64_t>(side, rows - i); ++r) {
        for (int64_t c = 0; c < std::min<int64_t>(side, columns - j); ++c) {
          *place.at(c, r).data = *block.at(r, c).data;
        }
      }
    }
  }
}

// to [rows, columns] = from [rows, columns]
template <typename from_t, typename to_t>
void convert(Matrix<const from_t> from, int64_t rows, int64_t columns, Matrix<to_t> to) {
  for (int64_t i = 0; i < rows; ++i) {
    at::vec::convert(from.at(i, 0).data, to.at(i, 0).data, columns);
  }
}

// Makes operands of type operand_t from a matrix of scalar_t. `scratch` holds an operand that had to be rearranged.
template <typename scalar_t, typename operand_t>
struct Operands {
  static constexpr bool converted = !std::is_same_v<scalar_t, operand_t>;
  static constexpr bool paired = is_half<operand_t>;
  static_assert(!(converted && paired));

  // Returns the left operand [m, k].
  static Matrix<const operand_t> left(Matrix<const scalar_t> from, int64_t m, int64_t k, operand_t* scratch) {
    if constexpr (converted) {
      convert(from, m, k, Matrix<operand_t>{scratch, k});
      return {scratch, k};
    } else {
      return from;
    }
  }

  // Returns the right operand [k, n]. Paired, it is [ceil(k / 2), n, 2]: an odd last row is paired with zeros.
  static Matrix<const operand_t> right(Matrix<const scalar_t> from, int64_t k, int64_t n, operand_t* scratch) {
    if constexpr (paired) {
      auto* pairs = reinterpret_cast<uint32_t*>(scratch);
      for (int64_t p = 0; p < k; p += 2, pairs += n) {
        const auto* first = reinterpret_cast<const uint16_t*>(from.at(p, 0).data);
        if (p + 1 < k) {
          const auto* second = reinterpret_cast<const uint16_t*>(from.at(p + 1, 0).data);
          for (int64_t j = 0; j < n; ++j) {
            pairs[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
          }
        } else {
          std::copy_n(first, n, pairs);
        }
      }
      return {scratch, n};
    } else if constexpr (converted) {
      convert(from, k, n, Matrix<operand_t>{scratch, n});
      return {scratch, n};
    } else {
      return from;
    }
  }

  // Returns the right operand [k, width] from a matrix [n, k], with zeros in the columns from n on. Paired, k is even.
  static Matrix<const operand_t> right_transposed(
      Matrix<const scalar_t> from, int64_t n, int64_t k, int64_t width, operand_t* scratch) {
    // A pair of features is moved as one word.
    using word_t = std::conditional_t<paired, float, operand_t>;
    const int64_t words = paired ? k / 2 : k;
    const Matrix<word_t> to{reinterpret_cast<word_t*>(scratch), width};
    if constexpr (converted) {
      constexpr int64_t side = 16;
      operand_t block[side * side];
      for (int64_t i = 0; i < n; i += side) {
        for (int64_t j = 0; j < k; j += side) {
          const int64_t height = std::min(side, n - i), length = std::min(side, k - j);
          convert(from.at(i, j), height, length, Matrix<operand_t>{block, side});
          transpose(Matrix<const operand_t>{block, side}, height, length, to.at(j, i));
        }
      }
    } else {
      const int64_t stride = paired ? from.stride / 2 : from.stride;
      transpose(Matrix<const word_t>{reinterpret_cast<const word_t*>(from.data), stride}, n, words, to);
    }
    if (width > n) {
      for (int64_t p = 0; p < words; ++p) {
        std::fill_n(to.at(p, n).data, width - n, word_t(0));
      }
    }
    return {scratch, width};
  }
};

}  // namespace lightkit::cpu::linear_cross_entropy
