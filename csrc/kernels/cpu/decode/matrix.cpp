#include "matrix.h"

#include "../common/parallel.h"

#include <cmath>
#include <limits>

namespace lightkit::cpu::decode {

float quantize(const float* values, int64_t count, int8_t* integers) {
  constexpr int64_t size = Vec::size();
  const Vec largest(127);
  // A NaN is the maximum.
  Vec most(0);
  for (int64_t i = 0; i < count; i += size) {
    most = at::vec::maximum(most, Vec::loadu(values + i, std::min(size, count - i)).abs());
  }
  const float scale = horizontal_max(most) / 127;
  if (!std::isfinite(scale) || scale == 0) {
    std::fill_n(integers, count, int8_t(scale == 0 ? 0 : 1));
    return scale == 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
  }
  for (int64_t i = 0; i < count; i += size) {
    const int64_t lanes = std::min(size, count - i);
    // The quotients of subnormal numbers may lie outside of the range.
    const Vec quotient = (Vec::loadu(values + i, lanes) / Vec(scale)).round();
    float rounded[size];
    at::vec::clamp(quotient, largest.neg(), largest).store(rounded);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      integers[i + lane] = static_cast<int8_t>(rounded[lane]);
    }
  }
  return scale;
}

Matrix::Matrix(const float* values, int64_t rows, int64_t columns, Precision precision)
    : rows_(rows),
      columns_(columns),
      precision_(precision),
      floats_(precision == Precision::Float ? Panels<float>::size(rows, columns) : 0),
      integers_(precision == Precision::Int8 ? Panels<int8_t>::size(rows, columns) : 0),
      scales_(precision == Precision::Int8 ? rows : 0) {
  const auto scatter = [&](const auto& panels, int64_t row, const auto* from) {
    auto* to = panels.at(row, 0);
    const int64_t width = panels.width(row / kPanel);
    for (int64_t k = 0; k < columns; ++k) {
      to[k * width] = from == nullptr ? 0 : from[k];
    }
  };
  const Panels<float> floats{floats_.data(), rows, columns};
  const Panels<int8_t> integers{integers_.data(), rows, columns};
  AlignedBuffer<int8_t> of_row(precision == Precision::Int8 ? columns : 0);
  // The rows that fill the last block are 0.
  for (int64_t row = 0; row < round_up(rows, kBlock); ++row) {
    const float* const from = row < rows ? values + row * columns : nullptr;
    if (precision == Precision::Float) {
      scatter(floats, row, from);
    } else if (from == nullptr) {
      scatter(integers, row, static_cast<const int8_t*>(nullptr));
    } else {
      scales_.data()[row] = quantize(from, columns, of_row.data());
      scatter(integers, row, of_row.data());
    }
  }
}

template <>
Panels<const float> Matrix::panels() const {
  return {floats_.data(), rows_, columns_};
}

template <>
Panels<const int8_t> Matrix::panels() const {
  return {integers_.data(), rows_, columns_};
}

void Matrix::copy_row(int64_t row, float* output) const {
  const auto gather = [&](const auto& panels, float scale) {
    const auto* from = panels.at(row, 0);
    const int64_t width = panels.width(row / kPanel);
    for (int64_t k = 0; k < columns_; ++k) {
      output[k] = static_cast<float>(from[k * width]) * scale;
    }
  };
  if (precision_ == Precision::Float) {
    gather(panels<float>(), 1);
  } else {
    gather(panels<int8_t>(), scales_.data()[row]);
  }
}

void Matrix::multiply(const float* input, int64_t count, float* output, bool add) const {
  const Product product{
      .rows = rows_,
      .columns = columns_,
      .scales = precision_ == Precision::Int8 ? scales_.data() : nullptr,
      .input = input,
      .input_stride = columns_,
      .output = output,
      .output_stride = rows_,
      .count = count,
      .add = add};
  const int64_t macs_of_panel = kPanel * columns_ * count;
  parallel_for(0, ceil_div(rows_, kPanel), ceil_div(kMacsPerThread, macs_of_panel), [&](int64_t begin, int64_t end) {
    if (precision_ == Precision::Float) {
      decode::multiply(panels<float>(), product, begin, end);
    } else {
      decode::multiply(panels<int8_t>(), product, begin, end);
    }
  });
}

}  // namespace lightkit::cpu::decode
