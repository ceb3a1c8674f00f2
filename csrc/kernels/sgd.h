// Stochastic gradient descent with momentum: one pass over the parameters of a whole model.
#pragma once

#include <cstdint>
#include <vector>

namespace lightkit {

enum class SgdType : uint8_t { Float, Double, BFloat16, Half };

// The options of torch.optim.SGD, and its update of parameter p with gradient g and momentum buffer m:
//
//   g = gradient_factor (maximize ? -g : g) + weight_decay p
//   m = first step ? g : momentum m + (1 - dampening) g
//   p = p - lr (nesterov ? g + momentum m : m)          without momentum: p - lr g
//   e = first average ? p : e + (1 - ema_decay) (p - e)
struct SgdOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
  double ema_decay;            // used where a tensor has an average
  double gradient_factor = 1;  // what clipping and loss scaling leave of a gradient
};

// One tensor of a step: its elements lie in the same order in all arrays, which do not overlap.
struct SgdTensor {
  void* parameter;
  const void* gradient;
  void* momentum;    // of the parameter's type, float beside a master weight; null where options->momentum is 0
  float* master;     // what a half-precision parameter is the rounding of, or null
  void* average;     // of the accumulation type (float, or double for double), or null
  int64_t numel;
  SgdType type;
  bool first;          // the momentum buffer holds nothing yet
  bool first_average;  // nor does the average
  bool stochastic;     // a BFloat16 parameter is rounded up or down at random
  uint64_t key;        // of that randomness
  const SgdOptions* options;
};

namespace cpu {

// Updates every tensor, the elements of all of them shared out evenly over the threads of at::parallel_for.
void sgd(const std::vector<SgdTensor>& tensors);

// The sum of the squares of all gradients, in double: NaN or infinite where one of them is. The result does not
// depend on the number of threads.
double gradient_square_sum(const std::vector<SgdTensor>& tensors);

}  // namespace cpu
}  // namespace lightkit
