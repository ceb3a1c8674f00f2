// Rounds the rows of weights to a few levels, for training that foresees a quantized network.
#pragma once

#include <cstdint>
#include <vector>

namespace lightkit::cpu::fake_quantize {

// The rows of a tensor: y[r, i] = q scales[r], with integers q. With 8, 4 and 3 bits and n = 127, 7 and 3,
//
//   scales[r] = max |x[r]| / n        q = clamp(rint(x / scales[r]), -n, n), to the nearest even integer
//
// and with 2 bits q is -3, -1, 1 or 3, of equal steps, around the statistics of the row (Choi et al., Bridging the
// accuracy gap for 2-bit quantized neural networks, 2018):
//
//   alpha = 3.2 sqrt(mean x^2) - 2.1 mean |x| = (32 sqrt(n sum x^2) - 21 sum |x|) / (10 n), for n elements
//   scales[r] = max(alpha / 3, max |x| / 48)        |q| = |x| < 2 scales[r] ? 1 : 3
//
// Sums and alpha / 3 are computed in double, the sums in the order that fake_quantize.cpp has. A scale below 2^-64
// becomes 1, or 2^-64 with 2 bits: the row is zero, or nearly zero. All other operations are those of float, not fused.
struct Rows {
  const float* weights;  // [rows, columns]
  float* outputs;        // [rows, columns]
  float* scales;         // [rows]
  int64_t rows, columns;
};

// Computes all tensors, none of which is empty. Threads share the rows. `bits` is 2, 3, 4 or 8.
void fake_quantize(const std::vector<Rows>& tensors, int64_t bits);

}  // namespace lightkit::cpu::fake_quantize
