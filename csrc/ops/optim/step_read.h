// The first part of a step: it reads the parameter groups and the optimizer's state.
#pragma once

#include "../common/python_tensor.h"
#include "step_plan.h"

namespace lightkit {

inline size_t list_size(PyObject* list) {
  return static_cast<size_t>(PyList_GET_SIZE(list));
}

inline size_t dict_size(PyObject* dict) {
  return static_cast<size_t>(PyDict_Size(dict));
}

// Returns a parameter's entry of the state, or null.
template <typename Algorithm>
PyObject* StepPlan<Algorithm>::find(const Object& state, size_t slot) {
  // Interned once: every step looks up every parameter.
  static const auto keys = [] {
    std::array<PyObject*, kSlots> made;
    for (size_t i = 0; i < kSlots; ++i) {
      made[i] = PyUnicode_InternFromString(slot_name(i));
    }
    return made;
  }();
  return PyDict_GetItem(state.get(), keys[slot]);
}

template <typename Algorithm>
PyObject* StepPlan<Algorithm>::find_count(const Object& state) {
  static PyObject* const key = PyUnicode_InternFromString("step");
  return PyDict_GetItem(state.get(), key);
}

// Returns true if groups and state hold the objects that the plan remembers.
template <typename Algorithm>
bool StepPlan<Algorithm>::is_current(const Memory& memory, const StepRequest& request) {
  if (list_size(request.param_groups) != memory.groups.size() ||
      dict_size(request.state) != memory.state_items.size()) {
    return false;
  }
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(request.state, &position, &key, &value); ++i) {
    if (key != memory.state_items[i].first.get() || value != memory.state_items[i].second.get()) {
      return false;
    }
  }
  for (size_t g = 0; g < memory.groups.size(); ++g) {
    const Object parameters = group_parameters(list_item(request.param_groups, g).get());
    if (list_size(parameters.get()) != memory.groups[g].size()) {
      return false;
    }
    for (size_t i = 0; i < memory.groups[g].size(); ++i) {
      const Entry& entry = memory.groups[g][i];
      if (PyList_GET_ITEM(parameters.get(), i) != entry.parameter.get()) {
        return false;
      }
      if (!entry.state) {
        continue;
      }
      for (size_t slot = 0; slot < kSlots; ++slot) {
        if (find(entry.state, slot) != entry.buffers[slot].get()) {
          return false;
        }
      }
      if (Algorithm::kCounts && find_count(entry.state) != entry.count.get()) {
        return false;
      }
    }
  }
  return true;
}

template <typename Algorithm>
typename StepPlan<Algorithm>::Memory StepPlan<Algorithm>::remember(const StepRequest& request) {
  Memory memory;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(request.state, &position, &key, &value)) {
    memory.state_items.emplace_back(Object::borrow(key), Object::borrow(value));
  }
  // By index: the lists may grow while a tensor is hashed.
  for (size_t g = 0; g < list_size(request.param_groups); ++g) {
    auto& entries = memory.groups.emplace_back();
    const Object parameters = group_parameters(list_item(request.param_groups, g).get());
    for (size_t i = 0; i < list_size(parameters.get()); ++i) {
      Entry entry;
      entry.parameter = list_item(parameters.get(), i);
      entry.state = Object::borrow(PyDict_GetItemWithError(request.state, entry.parameter.get()));
      if (!entry.state && PyErr_Occurred() != nullptr) {
        throw PythonError();
      }
      if (entry.state) {
        TORCH_CHECK_TYPE(
            PyDict_Check(entry.state.get()),
            Algorithm::kName,
            ": the state of a parameter must be a dict, got ",
            class_name(entry.state.get()));
        for (size_t slot = 0; slot < kSlots; ++slot) {
          entry.buffers[slot] = Object::borrow(find(entry.state, slot));
        }
        if (Algorithm::kCounts) {
          entry.count = Object::borrow(find_count(entry.state));
        }
      }
      entries.push_back(std::move(entry));
    }
  }
  return memory;
}

template <typename Algorithm>
typename StepPlan<Algorithm>::Group StepPlan<Algorithm>::read_group(PyObject* group, const StepRequest& request) {
  const bool averaged = has_group_extra(group, "ema_decay");
  const bool stochastic = has_group_extra(group, "stochastic_rounding");
  Options options = Algorithm::read(group);
  options.maximize = group_flag(group, "maximize");
  options.gradient_factor = request.inverse_scale;
  options.ema_decay = averaged ? group_number(group, "ema_decay") : 0;
  std::optional<c10::Device> device;
  const std::array<at::Tensor, 3> numbers{
      number_on_device(group_item(group, "lr").get()),
      number_on_device(request.grad_scale),
      number_on_device(request.found_inf)};
  const auto address = [&](const at::Tensor& number) -> const float* {
    if (!number.defined()) {
      return nullptr;
    }
    // Numbers on several devices are not for this kernel: no parameter is on a meta device.
    device = device.value_or(number.device()) == number.device() ? number.device() : c10::Device(at::kMeta);
    return number.const_data_ptr<float>();
  };
  options.lr_on_device = address(numbers[0]);
  options.scale_on_device = address(numbers[1]);
  options.skip_on_device = address(numbers[2]);
  return {
      .options = options,
      .device = device,
      .numbers = numbers,
      .master_weights = has_group_extra(group, "master_weights"),
      .averaged = averaged,
      .stochastic = stochastic,
      // As in torch.
      .counts_on_device = has_group_extra(group, "capturable") || has_group_extra(group, "fused"),
      .seed = stochastic ? group_bits(group, "rounding_seed") : 0,
  };
}

}  // namespace lightkit
