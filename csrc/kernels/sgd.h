// Stochastic gradient descent with momentum: one pass over the parameters of a whole model.
#pragma once

#include "step.h"

namespace lightkit {

// The options of torch.optim.SGD, and its update of parameter p with gradient g and momentum buffer m:
//
//   g = gradient_factor (maximize ? -g : g) + weight_decay p
//   m = first step ? g : momentum m + (1 - dampening) g
//   p = p - lr (nesterov ? g + momentum m : m)          without momentum: p - lr g
//   e = first average ? p : e + (1 - ema_decay) (p - e)
//
// The one state is m, of the parameter's type, float beside a master weight; null where momentum is 0.
struct SgdOptions : StepOptions {
  static constexpr size_t kStates = 1;
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
};

using SgdTensor = StepTensor<SgdOptions>;

namespace cpu {

// Updates every tensor, the elements of all of them shared out evenly over the threads of at::parallel_for.
void sgd(const std::vector<SgdTensor>& tensors);

}  // namespace cpu
}  // namespace lightkit
