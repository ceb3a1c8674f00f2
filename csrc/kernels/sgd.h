// Stochastic gradient descent with momentum: one pass over the parameters of a whole model.
#pragma once

#include <cstdint>
#include <vector>

namespace lightkit {

enum class SgdType : uint8_t { Float, Double, BFloat16, Half };

// The options of torch.optim.SGD, and its update of parameter p with gradient g and momentum buffer m:
//
//   g = (maximize ? -g : g) + weight_decay p
//   m = first step ? g : momentum m + (1 - dampening) g
//   p = p - lr (nesterov ? g + momentum m : m)          without momentum: p - lr g
struct SgdOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
};

// One tensor of a step: its elements lie in the same order in all three arrays, which do not overlap.
struct SgdTensor {
  void* parameter;
  const void* gradient;
  void* momentum;   // null where options->momentum is 0
  int64_t numel;
  SgdType type;
  bool first;       // the momentum buffer holds nothing yet
  const SgdOptions* options;
};

namespace cpu {

// Updates every tensor, the elements of all of them shared out evenly over the threads of at::parallel_for.
void sgd(const std::vector<SgdTensor>& tensors);

}  // namespace cpu
}  // namespace lightkit
