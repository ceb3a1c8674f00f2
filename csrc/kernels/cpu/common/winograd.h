// The transforms of Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016), and of the gradient of its weight. A tile of 4x4 inputs gives 2x2 positions of a convolution; in
// the transformed domain it takes 16 products for each pair of channels instead of 36.
#pragma once

#include "simd.h"

#include <array>

namespace lightkit::cpu::winograd {

template <typename T>
using Vec = at::vec::Vectorized<T>;

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

// Writes B^T d B of one vector of channels, where load(r, c) returns d[r][c].
template <typename T, typename Load>
void transform_input(
    const Load& load,
    T* points,  // [kPoints, width], points `stride` apart
    int64_t stride) {
  Vec<T> d[4][4];
  LIGHTKIT_UNROLL
  for (int r = 0; r < 4; ++r) {
    LIGHTKIT_UNROLL
    for (int c = 0; c < 4; ++c) {
      d[r][c] = load(r, c);
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
  constexpr int width = Vec<T>::size();
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

// Returns A^T m A + bias of one vector of channels: the positions (0, 0), (0, 1), (1, 0), (1, 1).
template <typename T>
std::array<Vec<T>, 4> transform_output(
    const T* points,  // [kPoints, width], points `stride` apart
    int64_t stride,
    const Vec<T>& bias) {
  Vec<T> upper[4];
  Vec<T> lower[4];
  LIGHTKIT_UNROLL
  for (int c = 0; c < 4; ++c) {
    const auto row = [&](int r) { return Vec<T>::loadu(points + (r * 4 + c) * stride); };
    const Vec<T> m1 = row(1);
    const Vec<T> m2 = row(2);
    upper[c] = row(0) + m1 + m2;
    lower[c] = m1 - m2 - row(3);
  }
  return {
      upper[0] + upper[1] + upper[2] + bias,
      upper[1] - upper[2] - upper[3] + bias,
      lower[0] + lower[1] + lower[2] + bias,
      lower[1] - lower[2] - lower[3] + bias};
}

// Applies A to one row or column of a gradient, except that the last value lacks its sign: A g = {g0, g0 + g1, g0 - g1,
// -g1}. transform_grad_weight_line has the sign instead.
template <typename T>
std::array<Vec<T>, 4> transform_gradient_line(const Vec<T>& g0, const Vec<T>& g1) {
  return {g0, g0 + g1, g0 - g1, g1};
}

// The point of a transformed gradient that is the sum of its four values.
inline constexpr int kSumPoint = 5;

// Writes A g A^T, without the signs of the last row and column, of one vector of output channels. `load(r, c)` returns
// g[r][c] of the 2x2 positions.
template <typename T, typename Load>
void transform_gradient(
    const Load& load,
    T* points,  // [kPoints, width], points `stride` apart
    int64_t stride) {
  const auto left = transform_gradient_line<T>(load(0, 0), load(1, 0));
  const auto right = transform_gradient_line<T>(load(0, 1), load(1, 1));
  LIGHTKIT_UNROLL
  for (int r = 0; r < 4; ++r) {
    const auto row = transform_gradient_line<T>(left[r], right[r]);
    LIGHTKIT_UNROLL
    for (int c = 0; c < 4; ++c) {
      row[c].store(points + (r * 4 + c) * stride);
    }
  }
}

// Applies G^T to one row or column of products with a gradient of `transform_gradient`.
template <typename T>
std::array<Vec<T>, 3> transform_grad_weight_line(
    const Vec<T>& m0, const Vec<T>& m1, const Vec<T>& m2, const Vec<T>& m3) {
  const Vec<T> half(T(0.5));
  const Vec<T> sum = (m1 + m2) * half;
  return {m0 + sum, (m1 - m2) * half, sum - m3};
}

// Writes the gradient of the weight G^T m G of one vector of output channels: the transposition of the forward pass
// turns A^T [G w G^T * B^T d B] A into G^T [A g A^T * B^T d B] G.
template <typename T>
void transform_grad_weight(
    const T* points,  // [kPoints, width], points `stride` apart
    int64_t stride,
    T* weight,  // [3, 3, width], taps `tap_stride` apart
    int64_t tap_stride) {
  std::array<Vec<T>, 3> columns[4];
  LIGHTKIT_UNROLL
  for (int c = 0; c < 4; ++c) {
    const auto point = [&](int r) { return Vec<T>::loadu(points + (r * 4 + c) * stride); };
    columns[c] = transform_grad_weight_line<T>(point(0), point(1), point(2), point(3));
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < 3; ++r) {
    const auto row = transform_grad_weight_line<T>(columns[0][r], columns[1][r], columns[2][r], columns[3][r]);
    LIGHTKIT_UNROLL
    for (int c = 0; c < 3; ++c) {
      row[c].store(weight + (r * 3 + c) * tap_stride);
    }
  }
}

}  // namespace lightkit::cpu::winograd
