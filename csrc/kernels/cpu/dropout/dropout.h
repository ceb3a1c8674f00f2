// Dropout on a CPU: output = input * multiplier, whose multipliers a counter-based generator computes anew in every
// call.
#pragma once

#include <cstdint>

namespace lightkit::cpu::dropout {

template <typename scalar_t>
struct Problem {
  const scalar_t* input;  // [count]
  scalar_t* output;       // [count]
  int64_t count;
  uint64_t seed;
  double p;  // the probability of a multiplier of 0, between 0 and 1
};

// The multiplier of element i is 0 if its draw is less than p * 2^32, rounded to an integer, else 1 / (1 - p). A draw
// is uniform on the integers from 0 to 2^32 - 1, and depends only on the seed and on i. philox.h has the generator.
//
// The product with 0 is computed, as in torch: it is NaN for an infinite input.
template <typename scalar_t>
void dropout(const Problem<scalar_t>& problem);

}  // namespace lightkit::cpu::dropout
