// The step plan of lightkit.optim.Adam and AdamW.
#pragma once

#include "../../kernels/optim/adam.h"
#include "step_plan.h"

namespace lightkit {

// Updates parameters on one GPU, on its current stream.
void adam_cuda(const std::vector<AdamTensor>& tensors, c10::Device device);

struct AdamAlgorithm {
  using Options = AdamOptions;
  static constexpr const char* kName = "Adam";
  static constexpr std::array kStateNames{"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kCounts = true;
  static constexpr bool kZeroed = true;

  static Options read(PyObject* group);
  static bool uses(const Options& options, size_t state) {
    return state < 2 || options.amsgrad;
  }
  // A half-precision second moment would not change: 0.999 times a value rounds to the value.
  static at::ScalarType state_type(at::ScalarType parameter, bool) {
    return parameter == at::kDouble ? at::kDouble : at::kFloat;
  }
  static bool may_start_from_zeros(const Options&) {
    return true;
  }
  static void run(const std::vector<AdamTensor>& tensors, c10::Device device);
};

using AdamPlan = StepPlan<AdamAlgorithm>;

}  // namespace lightkit
