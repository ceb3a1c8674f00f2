#include "adam.h"

#include "step_plan_impl.h"

namespace lightkit {

AdamOptions AdamAlgorithm::read(PyObject* group) {
  const Object betas = group_item(group, "betas");
  const auto beta = [&](Py_ssize_t index) {
    const double value = PyFloat_AsDouble(Object::checked(PySequence_GetItem(betas.get(), index)).get());
    check_python(value == -1.0);
    return value;
  };
  AdamOptions options{};
  if (!number_on_device(group_item(group, "lr").get()).defined()) {
    options.lr = group_number(group, "lr");
  }
  options.beta1 = beta(0);
  options.beta2 = beta(1);
  options.eps = group_number(group, "eps");
  options.weight_decay = group_number(group, "weight_decay");
  options.decoupled = group_flag(group, "decoupled_weight_decay");
  options.amsgrad = group_flag(group, "amsgrad");
  return options;
}

void AdamAlgorithm::run(const std::vector<AdamTensor>& tensors, c10::Device device) {
#ifdef LIGHTKIT_CUDA
  if (device.is_cuda()) {
    return adam_cuda(tensors, device);
  }
#endif
  TORCH_INTERNAL_ASSERT(device.is_cpu());
  cpu::optim::adam(tensors);
}

template class StepPlan<AdamAlgorithm>;

}  // namespace lightkit
