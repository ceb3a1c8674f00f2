// Stochastic gradient descent with momentum over all parameters of a model in one pass.
#pragma once

#include "step.h"

namespace lightkit {

// The options of torch.optim.SGD. A step updates a parameter p with gradient g and momentum buffer m:
//
//   g = gradient_factor (maximize ? -g : g) + weight_decay p
//   m = first step ? g : momentum m + (1 - dampening) g
//   p = p - lr (nesterov ? g + momentum m : m)          without momentum: p - lr g
//   e = first average ? p : e + (1 - ema_decay) (p - e)
//
// The one state is m, null if momentum is 0. It has the parameter's type, or is float beside a master weight.
struct SgdOptions : StepOptions {
  static constexpr size_t kStates = 1;
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
};

using SgdTensor = StepTensor<SgdOptions>;

namespace cpu::optim {

// Updates every parameter. The threads of at::parallel_for share the elements of all of them evenly.
void sgd(const std::vector<SgdTensor>& tensors);

}  // namespace cpu::optim
}  // namespace lightkit
