#include "sgd.h"

#include "step_plan_impl.h"

namespace lightkit {

SgdOptions SgdAlgorithm::read(PyObject* group) {
  SgdOptions options{};
  if (!number_on_device(group_item(group, "lr").get()).defined()) {
    options.lr = group_number(group, "lr");
  }
  options.momentum = group_number(group, "momentum");
  options.dampening = group_number(group, "dampening");
  options.weight_decay = group_number(group, "weight_decay");
  options.nesterov = group_flag(group, "nesterov");
  return options;
}

void SgdAlgorithm::run(const std::vector<SgdTensor>& tensors, c10::Device device) {
#ifdef LIGHTKIT_CUDA
  if (device.is_cuda()) {
    return sgd_cuda(tensors, device);
  }
#endif
  TORCH_INTERNAL_ASSERT(device.is_cpu());
  cpu::optim::sgd(tensors);
}

template class StepPlan<SgdAlgorithm>;

}  // namespace lightkit
