// Parameters, gradients and states of an optimizer's step, for all optimizers and devices.
#pragma once

#include "../common/element_type.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lightkit {

// The options of all algorithms.
struct StepOptions {
  bool maximize = false;
  double gradient_factor = 1;  // of every gradient, from clipping and loss scaling
  double ema_decay = 0;        // of the averages
  // Numbers on a GPU, for which the host does not wait; null if there is none.
  const float* lr_on_device = nullptr;     // [1]: replaces the algorithm's learning rate
  const float* scale_on_device = nullptr;  // [1]: divides the gradients
  const float* skip_on_device = nullptr;   // [1]: the step does nothing unless this is 0
  const double* norm_on_device = nullptr;  // [1]: the norm of all gradients, which are scaled down to max_norm
  double max_norm = 0;
};

// One parameter of a step. All arrays have its elements in the same order, and do not overlap.
template <typename Options>
struct StepTensor {
  void* parameter;                             // [numel]
  const void* gradient;                        // [numel]
  std::array<void*, Options::kStates> states;  // [numel] each; null for states that the options do not use
  float* master;                               // [numel]: the parameter before it is rounded to half precision; or null
  void* average;        // [numel] of the accumulation type (double for double, else float); or null
  const uint8_t* mask;  // [numel]: 1, or 0 where parameter, master and average become 0, on a CPU; or null
  int64_t numel;
  ElementType type;        // of parameter and gradient
  int64_t count;           // of the parameter's steps up to this one, if the algorithm counts them on the host
  float* count_on_device;  // [1]: of the steps before this one, to which a GPU's step adds 1; or null
  bool first;              // the states are not initialised
  bool first_average;      // the average is not initialised
  bool stochastic;         // a BFloat16 parameter is rounded stochastically
  uint64_t key;            // of that randomness
  const Options* options;
};

// A gradient whose squares are summed.
struct Gradient {
  const void* data;  // [numel]
  int64_t numel;
  ElementType type;
};

namespace cpu::optim {

// Returns the sum of the squares of all values, in double: NaN or infinite if one of them is. The result does not
// depend on the number of threads.
double square_sum(const std::vector<Gradient>& gradients);

}  // namespace cpu::optim
}  // namespace lightkit
