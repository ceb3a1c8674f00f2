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

// Calls step(i, n) for vectors that make up a row; the last one may have fewer elements. The compiler knows n of all
// others.
template <typename Step>
void for_each_vector(int64_t columns, const Step& step) {
  constexpr int64_t size = Floats::size();
  int64_t i = 0;
  for (; i + size <= columns; i += size) {
    step(i, std::integral_constant<int64_t, size>());
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
  for_each_vector(columns, [&](int64_t i, auto n) {
    largest = at::vec::maximum(largest, Integers::loadu(row + i, n) & magnitude_bits);
  });
  // A reduction of at::vec takes some hundred cycles.
  int32_t lanes[Integers::size()];
  largest.store(lanes);
  return std::bit_cast<float>(*std::max_element(lanes, lanes + Integers::size()));
}

// Returns true if no lane of `a` is at least the lane of `limit`, or NaN.
bool all_below(const Floats& a, const Floats& limit) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(a, limit, _CMP_NLT_UQ) == 0;
#else
  return (a < limit).zero_mask() == 0;
#endif
}

// Rounds a row to multiples of `scale`. Needs no clamp: the largest magnitude is `levels` scales up to the rounding of
// the division.
void round_row(const float* row, int64_t columns, float scale, float* output) {
  // A product is faster than a division, and its integer is the same unless the quotient is near to a tie. Derived: the
  // product differs from the quotient by at most 128 * 3 * 2^-24, less than 2^-14.
  const Floats inverse(1 / scale);
  const Floats scales(scale);
  const Floats limit(0.5f - 0x1p-14f);
  for_each_vector(columns, [&](int64_t i, auto n) {
    const auto x = Floats::loadu(row + i, n);
    const Floats product = x * inverse;
    Floats q = product.round();
    if (!all_below((product - q).abs(), limit)) {
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

typedef float FloatLanes __attribute__((vector_size(kSumLanes / 2 * sizeof(float))));
typedef double SumLanes __attribute__((vector_size(kSumLanes / 2 * sizeof(double))));
typedef int64_t BitLanes __attribute__((vector_size(sizeof(SumLanes))));

SumLanes widened(const float* values) {
#if defined(CPU_CAPABILITY_AVX512)
  // The compiler converts each half of the vector, and puts the halves together.
  return reinterpret_cast<SumLanes>(_mm512_cvtps_pd(_mm256_loadu_ps(values)));
#else
  FloatLanes lanes;
  std::memcpy(&lanes, values, sizeof(lanes));
  return __builtin_convertvector(lanes, SumLanes);
#endif
}

double sum_of_lanes(const SumLanes* halves) {  // [2]
  const SumLanes s = halves[0] + halves[1];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

Statistics statistics_of(const float* row, int64_t columns) {
  SumLanes squares[2] = {}, magnitudes[2] = {};
  const auto add = [&](const float* values) {  // [kSumLanes]
    LIGHTKIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto bits = reinterpret_cast<BitLanes>(widened(values + half * kSumLanes / 2));
      const auto x = reinterpret_cast<SumLanes>(bits & INT64_MAX);
      // The square of a float is exact in double, fused with the sum or not.
      squares[half] += x * x;
      magnitudes[half] += x;
    }
  };
  int64_t i = 0;
  for (; i + kSumLanes <= columns; i += kSumLanes) {
    add(row + i);
  }
  if (i < columns) {
    float rest[kSumLanes] = {};
    std::copy_n(row + i, columns - i, rest);
    add(rest);
  }
  return {sum_of_lanes(squares), sum_of_lanes(magnitudes)};
}

float two_bit_scale(const float* row, int64_t columns, float largest) {
  const Statistics sums = statistics_of(row, columns);
  const auto count = static_cast<double>(columns);
  // In memory, because the compiler could fuse the product with the difference. The other product is exact.
  const volatile double magnitudes = sums.magnitudes * 21;
  const auto scale = static_cast<float>((std::sqrt(sums.squares * count) * 32 - magnitudes) / (30 * count));
  const float least = largest / 48;
  return scale < least ? least : scale;
}

void split_row(const float* row, int64_t columns, float scale, float* output) {
  static_assert(LaneTypes<float>::count == Floats::size());
  const LaneNumbers<float> sign_bit = LaneNumbers<float>{} + INT32_MIN;
  const Lanes<float> threshold = Lanes<float>{} + 2 * scale;
  const Lanes<float> inner = Lanes<float>{} + scale;
  const Lanes<float> outer = Lanes<float>{} + 3 * scale;
  for_each_vector(columns, [&](int64_t i, auto n) {
    const auto bits = reinterpret_cast<LaneNumbers<float>>(load_lanes<Lanes<float>>(row + i, n));
    const auto magnitude = reinterpret_cast<Lanes<float>>(bits & ~sign_bit);
    const auto level = reinterpret_cast<LaneNumbers<float>>(magnitude >= threshold ? outer : inner);
    store_lanes(reinterpret_cast<Lanes<float>>(level | (bits & sign_bit)), output + i, n);
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
