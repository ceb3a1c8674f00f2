#include "sample.h"

#include "panels.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace lightkit::cpu::decode {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Returns the first index of the largest value; NaN counts as the largest.
int64_t argmax(const float* values, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count && !std::isnan(values[best]); ++i) {
    if (!(values[i] <= values[best])) {
      best = i;
    }
  }
  return best;
}

// Replaces all values below the k-th largest, which is no NaN, by -inf.
void keep_largest(float* values, int64_t count, int64_t k) {
  std::vector<float> sorted(values, values + count);
  // NaN has no place in an order of numbers.
  std::replace_if(sorted.begin(), sorted.end(), [](float value) { return std::isnan(value); }, kLowest);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
  const float least = sorted[k - 1];
  std::replace_if(values, values + count, [least](float value) { return value < least; }, kLowest);
}

}  // namespace

int64_t sample(float* logits, int64_t count, const Sampling& sampling, const float* draws) {
  if (sampling.temperature == 0) {
    return argmax(logits, count);
  }
  if (sampling.top_k < count) {
    keep_largest(logits, count, sampling.top_k);
  }
  constexpr int64_t size = Vec::size();
  const Vec temperature(static_cast<float>(sampling.temperature));
  Vec most(kLowest);
  for (int64_t i = 0; i < count; i += size) {
    const int64_t lanes = std::min(size, count - i);
    const Vec scaled = load(logits + i, lanes, kLowest) / temperature;
    scaled.store(logits + i, static_cast<int>(lanes));
    most = at::vec::maximum(most, scaled);
  }
  const Vec subtrahend(horizontal_max(most));
  Vec sum(0);
  for (int64_t i = 0; i < count; i += size) {
    const int64_t lanes = std::min(size, count - i);
    // The probabilities times one number, which does not change the order.
    const Vec weights = exp_bounded(load(logits + i, lanes, kLowest) - subtrahend);
    sum = sum + weights;
    (weights / load(draws + i, lanes, 1.0f)).store(logits + i, static_cast<int>(lanes));
  }
  return std::isnan(horizontal_sum(sum)) ? -1 : argmax(logits, count);
}

}  // namespace lightkit::cpu::decode
