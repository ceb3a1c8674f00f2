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

namespace {

// Copies `count` rows to a panel, whose other rows become 0. from [count, columns].
template <typename T>
void interleave(const Panels<T>& matrix, int64_t panel, const T* from, int64_t count) {
  const int64_t columns = matrix.columns, width = matrix.width(panel);
  T* const to = matrix.panel(panel);
  // In parts whose cache lines stay in the cache while all rows write to them.
  constexpr int64_t part = 16;
  for (int64_t begin = 0; begin < columns; begin += part) {
    const int64_t end = std::min(columns, begin + part);
    for (int64_t row = 0; row < width; ++row) {
      for (int64_t k = begin; k < end; ++k) {
        to[k * width + row] = row < count ? from[row * columns + k] : T(0);
      }
    }
  }
}

}  // namespace

Matrix::Matrix(const float* values, int64_t rows, int64_t columns, Precision precision)
    : rows_(rows),
      columns_(columns),
      precision_(precision),
      floats_(precision == Precision::Float ? Panels<float>::size(rows, columns) : 0),
      integers_(precision == Precision::Int8 ? Panels<int8_t>::size(rows, columns) : 0),
      scales_(precision == Precision::Int8 ? rows : 0) {
  AlignedBuffer<int8_t> rounded(precision == Precision::Int8 ? kPanel * columns : 0);
  for (int64_t panel = 0; panel < ceil_div(rows, kPanel); ++panel) {
    const int64_t first = panel * kPanel, count = std::min(kPanel, rows - first);
    const float* const from = values + first * columns;
    if (precision == Precision::Float) {
      interleave({floats_.data(), rows, columns}, panel, from, count);
      continue;
    }
    for (int64_t row = 0; row < count; ++row) {
      scales_.data()[first + row] = quantize(from + row * columns, columns, rounded.data() + row * columns);
    }
    interleave<int8_t>({integers_.data(), rows, columns}, panel, rounded.data(), count);
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
