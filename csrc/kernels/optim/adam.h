// Adam and AdamW over all parameters of a model in one pass.
#pragma once

#include "step.h"

namespace lightkit {

// The options of torch.optim.Adam. The t-th step updates a parameter p with gradient g (Kingma and Ba, Adam: a method
// for stochastic optimization, ICLR 2015; decoupled: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR
// 2019; amsgrad: Reddi et al., On the convergence of Adam and beyond, ICLR 2018):
//
//   g = gradient_factor (maximize ? -g : g)
//   decoupled ? p = p - lr weight_decay p : g = g + weight_decay p
//   m = m + (1 - beta1) (g - m)
//   v = beta2 v + (1 - beta2) g^2
//   x = amsgrad ? max(x, v) : v
//   p = p - lr / (1 - beta1^t) m / (sqrt(x) / sqrt(1 - beta2^t) + eps)
//   e = first average ? p : e + (1 - ema_decay) (p - e)
//
// The states are m, v and x (null without amsgrad), all of the accumulation type.
struct AdamOptions : StepOptions {
  static constexpr size_t kStates = 3;
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled;
  bool amsgrad;
};

using AdamTensor = StepTensor<AdamOptions>;

namespace cpu::optim {

// Updates every parameter. The threads of at::parallel_for share the elements of all of them evenly.
void adam(const std::vector<AdamTensor>& tensors);

}  // namespace cpu::optim
}  // namespace lightkit
