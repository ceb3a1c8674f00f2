// The transforms of Winograd's minimal filtering, F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2016): the 2x2 positions of a pool, whose inputs are a tile of 4x4, take 16 products for each pair
// of channels in place of 36.
#pragma once

#include "conv_relu_pool.h"

namespace lightkit::cpu::winograd {

// Values of a tile, and of a weight, in the transformed domain.
inline constexpr int kPoints = 16;

// B^T d B, with the factors of a row or column.
template <typename T>
void transform_input_line(Vec<T>& d0, Vec<T>& d1, Vec<T>& d2, Vec<T>& d3) {
  const Vec<T> sum = d1 + d2;
  const Vec<T> difference = d2 - d1;
  d0 = d0 - d2;
  d3 = d1 - d3;
  d1 = sum;
  d2 = difference;
}

// One vector of channels of a tile, whose rows and columns lie so far apart; to points `stride` apart.
template <typename T>
void transform_input(const T* tile, int64_t row_size, int64_t column_size, T* points, int64_t stride) {
  Vec<T> d[4][4];
  LIGHTKIT_UNROLL for (int r = 0; r < 4; ++r) {
    LIGHTKIT_UNROLL for (int c = 0; c < 4; ++c) {
      d[r][c] = Vec<T>::loadu(tile + r * row_size + c * column_size);
    }
  }
  LIGHTKIT_UNROLL for (int r = 0; r < 4; ++r) {
    transform_input_line<T>(d[r][0], d[r][1], d[r][2], d[r][3]);
  }
  LIGHTKIT_UNROLL for (int c = 0; c < 4; ++c) {
    transform_input_line<T>(d[0][c], d[1][c], d[2][c], d[3][c]);
  }
  LIGHTKIT_UNROLL for (int r = 0; r < 4; ++r) {
    LIGHTKIT_UNROLL for (int c = 0; c < 4; ++c) {
      d[r][c].store(points + (r * 4 + c) * stride);
    }
  }
}

template <typename T>
std::array<Vec<T>, 4> transform_weight_line(const Vec<T>& g0, const Vec<T>& g1, const Vec<T>& g2) {
  const Vec<T> half(T(0.5));
  const Vec<T> ends = (g0 + g2) * half;
  const Vec<T> middle = g1 * half;
  return {g0, ends + middle, ends - middle, g2};
}

// G g G^T of one vector of weights, from 9 vectors in a row; to points `stride` apart.
template <typename T>
void transform_weight(const T* weight, T* points, int64_t stride) {
  constexpr int width = Vec<T>::size();
  std::array<Vec<T>, 4> rows[3];
  LIGHTKIT_UNROLL for (int r = 0; r < 3; ++r) {
    const T* row = weight + r * 3 * width;
    rows[r] = transform_weight_line<T>(Vec<T>::loadu(row), Vec<T>::loadu(row + width), Vec<T>::loadu(row + 2 * width));
  }
  LIGHTKIT_UNROLL for (int c = 0; c < 4; ++c) {
    const auto column = transform_weight_line<T>(rows[0][c], rows[1][c], rows[2][c]);
    LIGHTKIT_UNROLL for (int r = 0; r < 4; ++r) {
      column[r].store(points + (r * 4 + c) * stride);
    }
  }
}

// A^T m A of one vector of channels, from points `stride` apart, plus a bias: the four positions as they are numbered,
// a vector each.
template <typename T>
void transform_output(const T* points, int64_t stride, const Vec<T>& bias, T* positions) {
  constexpr int width = Vec<T>::size();
  Vec<T> upper[4];
  Vec<T> lower[4];
  LIGHTKIT_UNROLL for (int c = 0; c < 4; ++c) {
    const auto point = [&](int r) { return Vec<T>::loadu(points + (r * 4 + c) * stride); };
    const Vec<T> m1 = point(1);
    const Vec<T> m2 = point(2);
    upper[c] = point(0) + m1 + m2;
    lower[c] = m1 - m2 - point(3);
  }
  (upper[0] + upper[1] + upper[2] + bias).store(positions);
  (upper[1] - upper[2] - upper[3] + bias).store(positions + width);
  (lower[0] + lower[1] + lower[2] + bias).store(positions + 2 * width);
  (lower[1] - lower[2] - lower[3] + bias).store(positions + 3 * width);
}

// Where it is faster than the products themselves: whole vectors of channels, and weights that stay in the
// second-level cache.
template <typename T>
bool applies(const ConvReluPoolShape& shape) {
  return shape.pool && shape.kernel_height == 3 && shape.kernel_width == 3 &&
      shape.in_channels % Vec<T>::size() == 0 &&
      shape.in_channels * shape.out_channels * kPoints * static_cast<int64_t>(sizeof(T)) <= 1 << 20;
}

}  // namespace lightkit::cpu::winograd
