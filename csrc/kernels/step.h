// What the steps of all optimizers have in common.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lightkit {

enum class ParameterType : uint8_t { Float, Double, BFloat16, Half };

// What every algorithm's options begin with.
struct StepOptions {
  bool maximize = false;
  double gradient_factor = 1;  // what clipping and loss scaling leave of a gradient
  double ema_decay = 0;        // used where a tensor has an average
  // What a GPU knows and the host need not wait for, or null: a learning rate that takes the place of the algorithm's,
  // a divisor of the gradients, whether the step is left out (not 0), and the norm of all gradients, which are scaled
  // down where it is above max_norm.
  const float* lr_on_device = nullptr;
  const float* scale_on_device = nullptr;
  const float* skip_on_device = nullptr;
  const double* norm_on_device = nullptr;
  double max_norm = 0;
};

// One tensor of a step: its elements lie in the same order in all arrays, which do not overlap.
template <typename Options>
struct StepTensor {
  void* parameter;
  const void* gradient;
  // The algorithm's own, see there; null where its options do without.
  std::array<void*, Options::kStates> states;
  float* master;   // what a half-precision parameter is the rounding of, or null
  void* average;   // of the accumulation type (float, or double for double), or null
  int64_t numel;
  ParameterType type;
  int64_t count;       // of this step among those that the parameter has taken, from 1; where the algorithm counts
  float* count_on_device;  // of the steps before this one, or null where `count` says it; a GPU's step adds to it
  bool first;          // the states hold nothing yet; where the algorithm does not start with zeros
  bool first_average;  // nor does the average
  bool stochastic;     // a BFloat16 parameter is rounded up or down at random
  uint64_t key;        // of that randomness
  const Options* options;
};

// Values whose squares are summed.
struct Gradient {
  const void* data;
  int64_t numel;
  ParameterType type;
};

namespace cpu {

// The sum of the squares of all values, in double: NaN or infinite where one of them is. The result does not
// depend on the number of threads.
double square_sum(const std::vector<Gradient>& gradients);

}  // namespace cpu
}  // namespace lightkit
