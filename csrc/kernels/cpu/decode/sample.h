// The choice of a token by logits.
#pragma once

#include <cstdint>

namespace lightkit::cpu::decode {

struct Sampling {
  double temperature;  // the divisor of the logits; 0 takes the likeliest token
  int64_t top_k;       // the number of the likeliest tokens to choose from
};

// Returns a token of [0, count), or -1 if the probabilities are NaN. Changes `logits` [count]; draws [count] are
// independent draws of the exponential distribution, and are not read at a temperature of 0. With them, the index of
// the largest probability / draw is a token with its probability: the draw nearest to 0 wins that race (the exponential
// form of the Gumbel-max trick), which is how torch.multinomial draws a single sample. Raises std::bad_alloc.
int64_t sample(float* logits, int64_t count, const Sampling& sampling, const float* draws);

}  // namespace lightkit::cpu::decode
