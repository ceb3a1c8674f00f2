// Matrices whose rows are interleaved, so that a product with a vector has no sums across the lanes of a vector, and
// reads the weights as one stream. Weights, keys and values all have this layout.
#pragma once

#include "../../common/ceil_div.h"
#include "../common/simd.h"
#include "tuning.h"

#include <cstdint>

namespace lightkit::cpu::decode {

enum class Precision { Float, Int8 };

// A matrix [rows, columns] in panels of kPanel rows. A panel holds its columns one after the other, each with its rows;
// the last panel has as many rows as remain, rounded up to whole blocks.
template <typename T>
struct Panels {
  T* values;  // [size(rows, columns)]
  int64_t rows;
  int64_t columns;

  static int64_t size(int64_t rows, int64_t columns) {
    return round_up(rows, kBlock) * columns;
  }

  int64_t width(int64_t panel) const {
    return std::min(kPanel, round_up(rows, kBlock) - panel * kPanel);
  }

  T* panel(int64_t index) const {
    return values + index * kPanel * columns;
  }

  T* at(int64_t row, int64_t column) const {
    const int64_t index = row / kPanel;
    return panel(index) + column * width(index) + row % kPanel;
  }
};

// The rows and columns of a matrix that a product takes, from the first on, and the vectors.
struct Product {
  int64_t rows;
  int64_t columns;
  const float* scales;   // [rows], or null for 1
  const float* input;    // [count, columns] with a stride
  int64_t input_stride;  // between vectors
  float* output;         // [count, rows] with a stride
  int64_t output_stride;
  int64_t count;
  bool add;  // to what `output` has
};

using Vec = at::vec::Vectorized<float>;

inline Vec load_weights(const float* weights) {
  return Vec::loadu(weights);
}

inline Vec load_weights(const int8_t* weights) {
// The compiler converts a vector of bytes in parts.
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(weights))));
#else
  float lanes[Vec::size()];
  for (int i = 0; i < Vec::size(); ++i) {
    lanes[i] = weights[i];
  }
  return Vec::loadu(lanes);
#endif
}

// Computes the products of the first `blocks` blocks of a panel with `inputs` vectors.
template <typename T, int blocks, int inputs>
void multiply_blocks(const T* weights, int64_t width, const Product& p, int64_t first_row, int64_t first_input) {
  constexpr int size = Vec::size();
  constexpr int vectors = blocks * (kBlock / size);
  Vec sums[inputs][vectors];
  LIGHTKIT_UNROLL
  for (int i = 0; i < inputs; ++i) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sums[i][v] = Vec(0);
    }
  }
  const float* const input = p.input + first_input * p.input_stride;
  for (int64_t k = 0; k < p.columns; ++k, weights += width) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const Vec w = load_weights(weights + v * size);
      LIGHTKIT_UNROLL
      for (int i = 0; i < inputs; ++i) {
        sums[i][v] = at::vec::fmadd(w, Vec(input[i * p.input_stride + k]), sums[i][v]);
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int i = 0; i < inputs; ++i) {
    float* const output = p.output + (first_input + i) * p.output_stride + first_row;
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const int64_t count = std::min<int64_t>(size, p.rows - first_row - v * size);
      if (count <= 0) {
        break;
      }
      Vec result = sums[i][v];
      if (p.scales != nullptr) {
        result = result * Vec::loadu(p.scales + first_row + v * size, count);
      }
      if (p.add) {
        result = result + Vec::loadu(output + v * size, count);
      }
      result.store(output + v * size, static_cast<int>(count));
    }
  }
}

template <typename T, int blocks>
void multiply_panel(const T* weights, int64_t width, const Product& p, int64_t first_row) {
  int64_t i = 0;
  if constexpr (kInputs > 1) {
    for (; i + kInputs <= p.count; i += kInputs) {
      multiply_blocks<T, blocks, kInputs>(weights, width, p, first_row, i);
    }
  }
  for (; i < p.count; ++i) {
    multiply_blocks<T, blocks, 1>(weights, width, p, first_row, i);
  }
}

// Computes output[i][r] = scales[r] * sum_k matrix[r][k] input[i][k] for the rows of the panels [begin, end).
template <typename T>
void multiply(const Panels<const T>& matrix, const Product& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const T* const weights = matrix.panel(index);
    const int64_t width = matrix.width(index), first_row = index * kPanel;
    switch (std::min<int64_t>(kPanel / kBlock, ceil_div(p.rows - first_row, kBlock))) {
      case 1:
        multiply_panel<T, 1>(weights, width, p, first_row);
        break;
      case 2:
        multiply_panel<T, 2>(weights, width, p, first_row);
        break;
      case 3:
        multiply_panel<T, 3>(weights, width, p, first_row);
        break;
      default:
        multiply_panel<T, 4>(weights, width, p, first_row);
    }
  }
}

// Rounds values to integers times a scale, which it returns: the largest magnitude divided by 127. Values that are not
// finite make the scale NaN.
float quantize(const float* values, int64_t count, int8_t* integers);

}  // namespace lightkit::cpu::decode
