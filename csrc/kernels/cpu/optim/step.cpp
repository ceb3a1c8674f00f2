#include "step.h"

#include "tuning.h"

#include <cstring>
#include <numeric>

namespace lightkit::cpu::optim {
namespace {

template <typename scalar_t>
double square_sum(const scalar_t* values, int64_t count) {  // [count]
  constexpr int64_t lanes = 8;
  alignas(64) accumulator_t<scalar_t> block[kNormBlock];
  double sums[lanes] = {};
  for (int64_t start = 0; start < count; start += kNormBlock) {
    const int64_t n = std::min(kNormBlock, count - start);
    const auto* x = as_accumulators(values + start, n, block);
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      for (int64_t k = 0; k < lanes; ++k) {
        sums[k] += static_cast<double>(x[i + k]) * static_cast<double>(x[i + k]);
      }
    }
    for (; i < n; ++i) {
      sums[i % lanes] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
  }
  return std::accumulate(sums, sums + lanes, 0.0);
}

}  // namespace

double square_sum(const std::vector<Gradient>& gradients) {
  // Each run of a tensor has a sum; the sums are added in the order of the runs.
  const auto starts = starts_of_runs(gradients, kNormRun);
  std::vector<double> sums(starts.back());
  parallel_for(0, starts.back(), kElementsPerThread / kNormRun, [&](int64_t begin, int64_t end) {
    size_t i = begin < end ? tensor_of(starts, begin) : 0;
    for (int64_t run = begin; run < end; ++run) {
      while (starts[i + 1] <= run) {
        ++i;
      }
      const Gradient& gradient = gradients[i];
      const int64_t from = (run - starts[i]) * kNormRun;
      const int64_t count = std::min(kNormRun, gradient.numel - from);
      sums[run] = with_type(gradient.type, [&](auto scalar) {
        return square_sum(static_cast<const decltype(scalar)*>(gradient.data) + from, count);
      });
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The hash is lowbias32 (C. Wellons, hash-prospector).
void round_stochastically(const float* values, at::BFloat16* out, int64_t count, uint64_t key, int64_t first_index) {
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<uint64_t>(first_index + i);
    uint32_t x = static_cast<uint32_t>(index) ^ static_cast<uint32_t>(key);
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    // The upper 32 bits of index and key enter the second round.
    x ^= static_cast<uint32_t>(index >> 32) ^ static_cast<uint32_t>(key >> 32);
    x = (x ^ (x >> 15)) * 0x735a2d97u;
    x ^= x >> 15;
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    // Infinity and NaN are not rounded.
    const uint32_t raised = (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + (x & 0xffffu);
    out[i].x = static_cast<uint16_t>(raised >> 16);
  }
}

}  // namespace lightkit::cpu::optim
