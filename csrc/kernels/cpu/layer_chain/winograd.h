// The transforms of Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016). The window of a pool reads a 4x4 tile of the input; in the transformed domain it takes 16 products
// for each pair of channels instead of 36.
#pragma once

#include "tuning.h"

#include <array>

namespace lightkit::cpu::layer_chain::winograd {

// Points of a tile, or of a weight, in the transformed domain.
inline constexpr int kPoints = 16;

// Applies B^T to one row or column of a tile.
template <typename T>
void transform_input_line(Vec<T>& d0, Vec<T>& d1, Vec<T>& d2, Vec<T>& d3) {
  const Vec<T> sum = d1 + d2;
  const Vec<T> difference = d2 - d1;
  d0 = d0 - d2;
  d3 = d1 - d3;
  d1 = sum;
  d2 = difference;
}

// Writes B^T d B of one vector of channels.
template <typename T>
void transform_input(
    const T* tile,  // [4, 4, width], rows `row_size` and columns `column_size` apart
    int64_t row_size,
    int64_t column_size,
    T* points,  // [kPoints, width], points `stride` apart
    int64_t stride) {
  Vec<T> d[4][4];
  LIGHTKIT_UNROLL
  for (int r = 0; r < 4; ++r) {
    LIGHTKIT_UNROLL
    for (int c = 0; c < 4; ++c) {
      d[r][c] = Vec<T>::loadu(tile + r * row_size + c * column_size);
    }
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < 4; ++r) {
    transform_input_line<T>(d[r][0], d[r][1], d[r][2], d[r][3]);
  }
  LIGHTKIT_UNROLL
  for (int c = 0; c < 4; ++c) {
    transform_input_line<T>(d[0][c], d[1][c], d[2][c], d[3][c]);
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < 4; ++r) {
    LIGHTKIT_UNROLL
    for (int c = 0; c < 4; ++c) {
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

// Writes G g G^T of one vector of output channels.
template <typename T>
void transform_weight(
    const T* weight,  // [3, 3, width]
    T* points,        // [kPoints, width], points `stride` apart
    int64_t stride) {
  constexpr int width = kWidth<T>;
  std::array<Vec<T>, 4> rows[3];
  LIGHTKIT_UNROLL
  for (int r = 0; r < 3; ++r) {
    const T* row = weight + r * 3 * width;
    rows[r] = transform_weight_line<T>(Vec<T>::loadu(row), Vec<T>::loadu(row + width), Vec<T>::loadu(row + 2 * width));
  }
  LIGHTKIT_UNROLL
  for (int c = 0; c < 4; ++c) {
    const auto column = transform_weight_line<T>(rows[0][c], rows[1][c], rows[2][c]);
    LIGHTKIT_UNROLL
    for (int r = 0; r < 4; ++r) {
      column[r].store(points + (r * 4 + c) * stride);
    }
  }
}

// Writes A^T m A + bias of one vector of channels.
template <typename T>
void transform_output(
    const T* points,  // [kPoints, width], points `stride` apart
    int64_t stride,
    const Vec<T>& bias,
    T* positions) {  // [window, width]
  constexpr int width = kWidth<T>;
  Vec<T> upper[4];
  Vec<T> lower[4];
  LIGHTKIT_UNROLL
  for (int c = 0; c < 4; ++c) {
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

// Returns true if the forward pass uses Winograd's algorithm: for pooled 3x3 kernels on whole vectors of input
// channels, whose transformed weights fit `kMaxWinogradWeightBytes`.
template <typename T>
bool applies(const Shape& shape) {
  return shape.pool && shape.kernel_height == 3 && shape.kernel_width == 3 && shape.in_channels % kWidth<T> == 0 &&
      shape.in_channels * shape.out_channels * kPoints * static_cast<int64_t>(sizeof(T)) <= kMaxWinogradWeightBytes;
}

}  // namespace lightkit::cpu::layer_chain::winograd
