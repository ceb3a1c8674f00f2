// The step plan of lightkit.optim.SGD.
#pragma once

#include "../../kernels/optim/sgd.h"
#include "step_plan.h"

namespace lightkit {

// Updates parameters on one GPU, on its current stream.
void sgd_cuda(const std::vector<SgdTensor>& tensors, c10::Device device);

struct SgdAlgorithm {
  using Options = SgdOptions;
  static constexpr const char* kName = "SGD";
  static constexpr std::array kStateNames{"momentum_buffer"};
  static constexpr bool kCounts = false;
  static constexpr bool kZeroed = false;

  static Options read(PyObject* group);
  static bool uses(const Options& options, size_t) {
    return options.momentum != 0;
  }
  static at::ScalarType state_type(at::ScalarType parameter, bool master) {
    return master ? at::kFloat : parameter;
  }
  static bool may_start_from_zeros(const Options& options) {
    return options.momentum == 0 || options.dampening == 0;
  }
  static void run(const std::vector<SgdTensor>& tensors, c10::Device device);
};

using SgdPlan = StepPlan<SgdAlgorithm>;

}  // namespace lightkit
