// A weight matrix of a decoder, in float32 or in int8 with a scale for each row.
#pragma once

#include "../common/aligned_buffer.h"
#include "panels.h"

namespace lightkit::cpu::decode {

class Matrix {
 public:
  // Copies values [rows, columns], both at least 1. Raises std::bad_alloc.
  Matrix(const float* values, int64_t rows, int64_t columns, Precision precision);

  int64_t rows() const {
    return rows_;
  }
  int64_t columns() const {
    return columns_;
  }

  // Copies a row to `output` [columns].
  void copy_row(int64_t row, float* output) const;

  // Computes output[i] = matrix * input[i] for `count` vectors, on as many threads as their number pays for; `add` adds
  // the product to what `output` has. input [count, columns], output [count, rows].
  void multiply(const float* input, int64_t count, float* output, bool add = false) const;

 private:
  template <typename T>
  Panels<const T> panels() const;

  const int64_t rows_;
  const int64_t columns_;
  const Precision precision_;
  // One of the two has the values.
  AlignedBuffer<float> floats_;
  AlignedBuffer<int8_t> integers_;
  AlignedBuffer<float> scales_;  // [rows] for int8
};

}  // namespace lightkit::cpu::decode
