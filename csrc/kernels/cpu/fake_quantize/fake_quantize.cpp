#include "fake_quantize.h"

#include "../../common/ceil_div.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "tuning.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace lightkit::cpu::fake_quantize {
namespace {

using Floats = at::vec::Vectorized<float>;
using Integers = at::vec::Vectorized<int32_t>;

// Below this scale a row counts as zero. Chosen: products of scales stay far from the smallest float.
constexpr float kLeastScale = 0x1p-64f;

// Calls step(i, n) for vectors that make up a row; the last one may have fewer elements.
template <typename Step>
void for_each_vector(int64_t columns, const Step& step) {
  constexpr int64_t size = Floats::size();
  int64_t i = 0;
  for (; i + size <= columns; i += size) {
    step(i, size);
  }
  if (i < columns) {
    step(i, columns - i);
  }
}

// Returns the largest magnitude: NaN if there is one, whose bits are above those of infinity.
float largest_magnitude(const float* row, int64_t columns) {
  static_assert(Floats::size() == Integers::size());
  const Integers magnitude_bits(0x7fffffff);
  Integers largest(0);
  for_each_vector(columns, [&](int64_t i, int64_t n) {
    largest = at::vec::maximum(largest, Integers::loadu(row + i, n) & magnitude_bits);
  });
  const auto maximum = [](const Integers& a, const Integers& b) { return at::vec::maximum(a, b); };
  return std::bit_cast<float>(at::vec::vec_reduce_all<int32_t>(maximum, largest));
}

// Rounds a row to multiples of `scale`. Needs no clamp: the largest magnitude is `levels` scales up to the rounding of
// the division.
void round_row(const float* row, int64_t columns, float scale, float* output) {
  // A product is faster than a division, and its integer is the same unless the quotient is near to a tie. Derived: the
  // product differs from the quotient by at most 128 * 3 * 2^-24, less than 2^-14.
  const Floats inverse(1 / scale);
  const Floats scales(scale);
  const Floats limit(0.5f - 0x1p-14f);
  for_each_vector(columns, [&](int64_t i, int64_t n) {
    const auto x = Floats::loadu(row + i, n);
    const Floats product = x * inverse;
    Floats q = product.round();
    // Also true for NaN.
    if (((product - q).abs() < limit).zero_mask() != 0) {
      q = (x / scales).round();
    }
    (q * scales).store(output + i, static_cast<int>(n));
  });
}

// The sums of squares and magnitudes of a row. Element i is added to lane i % kSumLanes, in order; then the lanes are
// added, the upper half to the lower half.
struct Statistics {
  double squares, magnitudes;
};

constexpr int kSumLanes = 16;

double sum_of_lanes(double* lanes) {  // [kSumLanes]
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}

Statistics statistics_of(const float* row, int64_t columns) {
  typedef float Half __attribute__((vector_size(kSumLanes / 2 * sizeof(float))));
  typedef double Sum __attribute__((vector_size(kSumLanes / 2 * sizeof(double))));
  Sum squares[2] = {}, magnitudes[2] = {};
  for (int64_t start = 0; start < columns; start += kSumLanes) {
    float values[kSumLanes] = {};
    const float* from = row + start;
    if (columns - start < kSumLanes) {
      std::copy_n(from, columns - start, values);
      from = values;
    }
    LIGHTKIT_UNROLL
    for (int part = 0; part < 2; ++part) {
      Half half;
      std::memcpy(&half, from + part * kSumLanes / 2, sizeof(half));
      const Sum x = __builtin_convertvector(half, Sum);
      // The square of a float is exact in double, fused with the sum or not.
      squares[part] += x * x;
      magnitudes[part] += x < 0 ? -x : x;
    }
  }
  double lanes[2][kSumLanes];
  std::memcpy(lanes[0], squares, sizeof(squares));
  std::memcpy(lanes[1], magnitudes, sizeof(magnitudes));
  return {sum_of_lanes(lanes[0]), sum_of_lanes(lanes[1])};
}

float two_bit_scale(const float* row, int64_t columns, float largest) {
  const Statistics sums = statistics_of(row, columns);
  const auto count = static_cast<double>(columns);
  // Quotients: the compiler could fuse products with the difference.
  const double alpha = std::sqrt(sums.squares / count) * 16 / 5 - sums.magnitudes / count * 21 / 10;
  const auto rounded = static_cast<float>(alpha);
  const float least = largest / 16;
  return (rounded < least ? least : rounded) / 3;
}

void split_row(const float* row, int64_t columns, float scale, float* output) {
  const Floats threshold(2 * scale);
  const Floats inner(scale);
  const Floats outer(3 * scale);
  for_each_vector(columns, [&](int64_t i, int64_t n) {
    const auto x = Floats::loadu(row + i, n);
    const Floats magnitude = Floats::blendv(inner, outer, x.abs() >= threshold);
    Floats::blendv(magnitude, magnitude.neg(), x < Floats(0)).store(output + i, static_cast<int>(n));
  });
}

void quantize_row(const Rows& tensor, int64_t row, int64_t bits) {
  const float* x = tensor.weights + row * tensor.columns;
  float* output = tensor.outputs + row * tensor.columns;
  const float largest = largest_magnitude(x, tensor.columns);
  float& scale = tensor.scales[row];
  if (bits == 2) {
    scale = two_bit_scale(x, tensor.columns, largest);
    scale = scale < kLeastScale ? kLeastScale : scale;
    split_row(x, tensor.columns, scale, output);
  } else {
    scale = largest / static_cast<float>((1 << (bits - 1)) - 1);
    scale = scale < kLeastScale ? 1 : scale;
    round_row(x, tensor.columns, scale, output);
  }
}

}  // namespace

void fake_quantize(const std::vector<Rows>& tensors, int64_t bits) {
  // The elements of all tensors are numbered. starts[i] is the first one of tensor i.
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    starts[i + 1] = starts[i] + tensors[i].rows * tensors[i].columns;
  }
  parallel_for(0, starts.back(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    // A range has the rows that begin in it.
    for (size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
         i < tensors.size() && starts[i] < end;
         ++i) {
      const Rows& tensor = tensors[i];
      const int64_t first = ceil_div(std::max<int64_t>(begin - starts[i], 0), tensor.columns);
      const int64_t last = std::min(ceil_div(end - starts[i], tensor.columns), tensor.rows);
      for (int64_t row = first; row < last; ++row) {
        quantize_row(tensor, row, bits);
      }
    }
  });
}

}  // namespace lightkit::cpu::fake_quantize
