// What a step plan does: for the files that make one of an algorithm.
#pragma once

#include "../common/python_tensor.h"
#include "step_plan.h"
#include "../common/tensors.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lightkit {

inline size_t list_size(PyObject* list) {
  return static_cast<size_t>(PyList_GET_SIZE(list));
}

inline size_t dict_size(PyObject* dict) {
  return static_cast<size_t>(PyDict_Size(dict));
}

template <typename Algorithm>
bool StepPlan<Algorithm>::is_current(
    const Memory& memory, PyObject* param_groups, PyObject* state) {
  if (list_size(param_groups) != memory.groups.size() || dict_size(state) != memory.state_items.size()) {
    return false;
  }
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(state, &position, &key, &value); ++i) {
    if (key != memory.state_items[i].first.get() || value != memory.state_items[i].second.get()) {
      return false;
    }
  }
  for (size_t g = 0; g < memory.groups.size(); ++g) {
    const Object parameters = group_parameters(list_item(param_groups, g).get());
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
typename StepPlan<Algorithm>::Group StepPlan<Algorithm>::read_group(
    PyObject* group,
    double inverse_scale,
    PyObject* grad_scale,
    PyObject* found_inf) {
  const bool averaged = has_group_extra(group, "ema_decay");
  const bool stochastic = has_group_extra(group, "stochastic_rounding");
  Options options = Algorithm::read(group);
  options.maximize = group_flag(group, "maximize");
  options.gradient_factor = inverse_scale;
  options.ema_decay = averaged ? group_number(group, "ema_decay") : 0;
  std::optional<c10::Device> device;
  const std::array<at::Tensor, 3> numbers{
      number_on_device(group_item(group, "lr").get()), number_on_device(grad_scale), number_on_device(found_inf)};
  const auto place = [&](const at::Tensor& number) -> const float* {
    if (!number.defined()) {
      return nullptr;
    }
    // No parameter is on a device of this kind: numbers on several devices are not for this kernel.
    device = device.value_or(number.device()) == number.device() ? number.device() : c10::Device(at::kMeta);
    return number.const_data_ptr<float>();
  };
  options.lr_on_device = place(numbers[0]);
  options.scale_on_device = place(numbers[1]);
  options.skip_on_device = place(numbers[2]);
  return {
      .options = options,
      .device = device,
      .numbers = numbers,
      .master_weights = has_group_extra(group, "master_weights"),
      .averaged = averaged,
      .stochastic = stochastic,
      // As torch has it.
      .counts_on_device = has_group_extra(group, "capturable") || has_group_extra(group, "fused"),
      .seed = stochastic ? group_bits(group, "rounding_seed") : 0,
  };
}

template <typename Algorithm>
typename StepPlan<Algorithm>::Memory StepPlan<Algorithm>::remember(
    PyObject* param_groups, PyObject* state) {
  Memory memory;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    memory.state_items.emplace_back(Object::borrow(key), Object::borrow(value));
  }
  // By index: the lists may grow while a tensor is hashed.
  for (size_t g = 0; g < list_size(param_groups); ++g) {
    auto& entries = memory.groups.emplace_back();
    const Object parameters = group_parameters(list_item(param_groups, g).get());
    for (size_t i = 0; i < list_size(parameters.get()); ++i) {
      Entry entry;
      entry.parameter = list_item(parameters.get(), i);
      entry.state = Object::borrow(PyDict_GetItemWithError(state, entry.parameter.get()));
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

// Finds or makes one of the buffers of a parameter.
template <typename Algorithm>
void StepPlan<Algorithm>::use_buffer(Update& update, size_t slot, at::ScalarType type) {
  const Object& held = update.entry->buffers[slot];
  update.first[slot] = !holds_tensor(held);
  if (update.first[slot]) {
    update.buffers[slot] = Algorithm::kZeroed && slot < kStates ? zeros_like(update.parameter, type)
                                                                : empty_like(update.parameter, type);
    return;
  }
  const at::Tensor& buffer = unpack_tensor(held);
  TORCH_CHECK(
      buffer.sizes() == update.parameter.sizes(),
      Algorithm::kName,
      ": a parameter of shape ",
      update.parameter.sizes(),
      " has a ",
      slot_name(slot),
      " of shape ",
      buffer.sizes());
  update.buffers[slot] = laid_out_as(buffer, update.parameter, type);
}

// Finds or makes the count of a parameter's steps; false where it is kept in a way that is not for this kernel.
template <typename Algorithm>
bool StepPlan<Algorithm>::find_counter(Update& update, const Group& group) {
  const Object& held = update.entry->count;
  const c10::Device device = update.parameter.device();
  // Whether a step counts that is left out for what a GPU knows, is known there alone.
  const bool belongs_there = !device.is_cpu() && (group.counts_on_device || group.options.skip_on_device != nullptr);
  if (!holds_tensor(held)) {
    update.new_count = zeros({}, at::TensorOptions(at::kFloat).device(belongs_there ? device : c10::Device(at::kCPU)));
    update.count = update.new_count.template mutable_data_ptr<float>();
    update.counts_on_device = belongs_there;
    return true;
  }
  update.count = step_counter(held, device);
  if (update.count == nullptr) {
    return false;
  }
  update.counts_on_device = !unpack_tensor(held).is_cpu();
  TORCH_CHECK_VALUE(
      update.counts_on_device || (*update.count >= 0 && *update.count < 0x1p62f),
      Algorithm::kName,
      ": the count of a parameter's steps must be a number from 0 up, got ",
      *update.count);
  if (belongs_there && !update.counts_on_device) {
    update.new_count = unpack_tensor(held).to(device);
    update.count = update.new_count.template mutable_data_ptr<float>();
    update.counts_on_device = true;
  }
  return true;
}

// Adds what is to be done for one parameter; false if that is not for this kernel.
template <typename Algorithm>
bool StepPlan<Algorithm>::gather(Entry& entry, const Group& group, std::vector<Update>& updates) {
  const at::Tensor parameter = unpack_tensor(entry.parameter);
  const at::Tensor gradient = parameter.grad();
  if (!gradient.defined()) {
    return true;
  }
  const auto type = parameter.scalar_type();
  if (!is_plain(parameter) || !is_plain(gradient) || !has_step_kernels(parameter.device()) ||
      gradient.device() != parameter.device() || group.device.value_or(parameter.device()) != parameter.device() ||
      !parameter_type(type) || !parameter.is_non_overlapping_and_dense()) {
    return false;
  }
  for (const auto& held : entry.buffers) {
    if (holds_tensor(held) && !is_plain(unpack_tensor(held))) {
      return false;
    }
  }
  Update& update = updates.emplace_back();
  update.entry = &entry;
  update.options = &group.options;
  update.parameter = parameter;
  const bool half = type == at::kBFloat16 || type == at::kHalf;
  const bool master = group.master_weights && half;
  update.stochastic = group.stochastic && !master && type == at::kBFloat16;
  if (Algorithm::kCounts && !find_counter(update, group)) {
    return false;
  }
  TORCH_CHECK(
      gradient.sizes() == parameter.sizes(),
      Algorithm::kName,
      ": a parameter of shape ",
      parameter.sizes(),
      " has a gradient of shape ",
      gradient.sizes());
  update.gradient = laid_out_as(gradient, parameter, type);
  for (size_t slot = 0; slot < kStates; ++slot) {
    if (Algorithm::uses(group.options, slot)) {
      use_buffer(update, slot, Algorithm::state_type(type, master));
    }
  }
  if (update.first[0] && group.options.skip_on_device != nullptr) {
    // Whether the step is taken is not known here: what it would leave unwritten must not be taken for a state.
    if (!Algorithm::may_start_from_zeros(group.options)) {
      return false;
    }
    std::for_each_n(update.buffers.begin(), kStates, [](at::Tensor& state) {
      if (state.defined()) {
        state.zero_();
      }
    });
    update.starts_from_zeros = true;
  }
  if (master) {
    use_buffer(update, kMaster, at::kFloat);
    if (update.first[kMaster]) {
      update.buffers[kMaster].copy_(parameter.detach());
    }
  }
  if (group.averaged) {
    use_buffer(update, kAverage, type == at::kDouble ? at::kDouble : at::kFloat);
    if (update.first[kAverage] && group.options.skip_on_device != nullptr) {
      // Nor is it known here whether there will be an average.
      return false;
    }
  }
  if (update.stochastic) {
    // Another sequence for each step and each place in it: odd factors spread both over all bits.
    update.key = group.seed * 0x9e3779b97f4a7c15u + (updates.size() - 1) * 0xbf58476d1ce4e5b9u;
  }
  return true;
}

template <typename Algorithm>
typename StepPlan<Algorithm>::Tensor StepPlan<Algorithm>::describe(const Update& update) {
  const auto memory = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  Tensor tensor{
      .parameter = update.parameter.mutable_data_ptr(),
      .gradient = update.gradient.const_data_ptr(),
      .states = {},
      .master = static_cast<float*>(memory(update.buffers[kMaster])),
      .average = memory(update.buffers[kAverage]),
      .numel = update.parameter.numel(),
      .type = *parameter_type(update.parameter.scalar_type()),
      .count = Algorithm::kCounts && !update.counts_on_device ? static_cast<int64_t>(*update.count) + 1 : 0,
      .count_on_device = update.counts_on_device ? update.count : nullptr,
      .first = update.first[0] && !update.starts_from_zeros,
      .first_average = update.first[kAverage],
      .stochastic = update.stochastic,
      .key = update.key,
      .options = update.options,
  };
  for (size_t slot = 0; slot < kStates; ++slot) {
    tensor.states[slot] = memory(update.buffers[slot]);
  }
  return tensor;
}

// Whether two parameters lie in the same memory, so that their updates must come one after the other. Looked
// at again only when a parameter has moved, or others have gradients.
template <typename Algorithm>
bool StepPlan<Algorithm>::shares_memory(Memory& memory, const std::vector<Update>& updates) {
  auto& places = memory.places;
  const auto lies_there = [](const Update& update, const void* place) {
    return update.parameter.const_data_ptr() == place;
  };
  if (std::equal(updates.begin(), updates.end(), places.begin(), places.end(), lies_there)) {
    return memory.shares_memory;
  }
  places.clear();
  for (const auto& update : updates) {
    places.push_back(update.parameter.const_data_ptr());
  }
  std::vector<std::pair<const char*, const char*>> spans;
  for (const auto& update : updates) {
    const auto* begin = static_cast<const char*>(update.parameter.const_data_ptr());
    if (update.parameter.numel() > 0) {
      spans.emplace_back(begin, begin + update.parameter.nbytes());
    }
  }
  std::sort(spans.begin(), spans.end());
  memory.shares_memory = std::adjacent_find(spans.begin(), spans.end(), [](const auto& a, const auto& b) {
                           return b.first < a.second;
                         }) != spans.end();
  return memory.shares_memory;
}

template <typename Algorithm>
void StepPlan<Algorithm>::run(const std::vector<Tensor>& tensors, c10::Device device, bool one_by_one) {
  if (!one_by_one) {
    return Algorithm::run(tensors, device);
  }
  for (const auto& tensor : tensors) {
    Algorithm::run({tensor}, device);
  }
}

// A CUDA graph repeats its launches: what was decided for one step on the host would hold for all of them.
template <typename Algorithm>
void StepPlan<Algorithm>::check_capture(const std::vector<Update>& updates) {
#ifdef LIGHTKIT_CUDA
  const auto on_gpu = [](const Update& update) { return update.parameter.is_cuda(); };
  if (std::none_of(updates.begin(), updates.end(), on_gpu) || !is_capturing()) {
    return;
  }
  for (const auto& update : updates) {
    TORCH_CHECK(
        !Algorithm::kCounts || update.counts_on_device,
        Algorithm::kName,
        ": a step captured in a CUDA graph must count its steps on the GPU: pass capturable=True");
    bool makes_state = update.new_count.defined();
    for (size_t slot = 0; slot < kSlots; ++slot) {
      makes_state = makes_state || (update.first[slot] && update.buffers[slot].defined());
    }
    TORCH_CHECK(
        !makes_state,
        Algorithm::kName,
        ": the step that makes the optimizer's state cannot be captured in a CUDA graph: take one before");
    TORCH_CHECK(
        !update.stochastic,
        Algorithm::kName,
        ": a step with stochastic_rounding cannot be captured in a CUDA graph: each replay would round alike");
  }
#endif
}

template <typename Algorithm>
typename StepPlan<Algorithm>::Norm StepPlan<Algorithm>::measure(
    const std::vector<std::pair<c10::Device, std::vector<Tensor>>>& by_device,
    double inverse_scale,
    const float* scale_on_device) {
  std::vector<Gradient> gradients;
  for (const auto& [device, tensors] : by_device) {
    for (const auto& tensor : tensors) {
      gradients.push_back({tensor.gradient, tensor.numel, tensor.type});
    }
  }
#ifdef LIGHTKIT_CUDA
  if (!by_device.empty() && by_device[0].first.is_cuda()) {
    return {.on_device = gradient_norm_cuda(gradients, by_device[0].first, std::abs(inverse_scale), scale_on_device)};
  }
#endif
  return {.value = std::sqrt(cpu::square_sum(gradients)) * std::abs(inverse_scale)};
}

template <typename Algorithm>
void StepPlan<Algorithm>::keep(
    const Object& state, const char* key, Object& place, const at::Tensor& tensor) {
  place = wrapped(tensor);
  if (PyDict_SetItemString(state.get(), key, place.get()) != 0) {
    throw PythonError();
  }
}

// Puts buffers made in this step where Python, and the next step, find them.
template <typename Algorithm>
void StepPlan<Algorithm>::keep_buffers(Update& update, PyObject* state) {
  Entry& entry = *update.entry;
  const auto owner = [&]() -> const Object& {
    if (!entry.state) {
      // As the defaultdict that the state of an optimizer is would do.
      const Object made = Object::checked(PyDict_New());
      entry.state = Object::checked(Py_XNewRef(PyDict_SetDefault(state, entry.parameter.get(), made.get())));
    }
    return entry.state;
  };
  if (update.new_count.defined()) {
    keep(owner(), "step", entry.count, update.new_count);
  }
  for (size_t slot = 0; slot < kSlots; ++slot) {
    const at::Tensor& buffer = update.buffers[slot];
    if (buffer.defined() && (update.first[slot] || !buffer.is_same(unpack_tensor(entry.buffers[slot])))) {
      keep(owner(), slot_name(slot), entry.buffers[slot], buffer);
    }
  }
}

template <typename Algorithm>
Object StepPlan<Algorithm>::step(
    PyObject* param_groups,
    PyObject* state,
    std::optional<double> max_grad_norm,
    bool skip_nonfinite,
    double inverse_scale,
    PyObject* grad_scale,
    PyObject* found_inf) {
  const auto is_number = [](PyObject* number) {
    return number == Py_None || number_on_device(number).defined();
  };
  TORCH_CHECK_TYPE(
      is_number(grad_scale) && is_number(found_inf),
      Algorithm::kName,
      ": grad_scale and found_inf must be None or float32 tensors of one element on a GPU, got ",
      class_name(grad_scale),
      " and ",
      class_name(found_inf));
  const Turn turn(mutex_);
  Memory memory = std::exchange(memory_, {});
  if (!is_current(memory, param_groups, state)) {
    memory = remember(param_groups, state);
  }
  Object outcome = take_step(
      memory, param_groups, state, max_grad_norm, skip_nonfinite, inverse_scale, grad_scale, found_inf);
  // Swapped: nothing is in the plan while Python destroys what has been there.
  std::swap(memory_, memory);
  return outcome;
}

template <typename Algorithm>
Object StepPlan<Algorithm>::take_step(
    Memory& memory,
    PyObject* param_groups,
    PyObject* state,
    std::optional<double> max_grad_norm,
    bool skip_nonfinite,
    double inverse_scale,
    PyObject* grad_scale,
    PyObject* found_inf) {
  std::vector<Group> groups;
  groups.reserve(memory.groups.size());
  std::vector<Update> updates;
  const auto count = [](size_t sum, const auto& entries) { return sum + entries.size(); };
  updates.reserve(std::accumulate(memory.groups.begin(), memory.groups.end(), size_t{0}, count));
  for (size_t g = 0; g < memory.groups.size(); ++g) {
    groups.push_back(read_group(list_item(param_groups, g).get(), inverse_scale, grad_scale, found_inf));
    for (auto& entry : memory.groups[g]) {
      if (!gather(entry, groups.back(), updates)) {
        return Object::borrow(Py_None);
      }
    }
  }

  check_capture(updates);
  // As a rule one device has them all.
  std::vector<std::pair<c10::Device, std::vector<Tensor>>> by_device;
  for (const auto& update : updates) {
    const c10::Device device = update.parameter.device();
    auto found = std::find_if(by_device.begin(), by_device.end(), [&](const auto& item) { return item.first == device; });
    if (found == by_device.end()) {
      found = by_device.insert(found, {device, {}});
      found->second.reserve(updates.size());
    }
    found->second.push_back(describe(update));
  }
  const bool measured = max_grad_norm.has_value() || skip_nonfinite;
  if (measured && by_device.size() > 1) {
    return Object::borrow(Py_None);
  }
  const bool one_by_one = shares_memory(memory, updates);
  Norm norm;
  bool skipped = false;
  {
    const WithoutGil release;
    if (measured) {
      norm = measure(by_device, inverse_scale, groups.empty() ? nullptr : groups[0].options.scale_on_device);
      if (skip_nonfinite) {
        skipped = !std::isfinite(norm.on_device.defined() ? norm.on_device.template item<double>() : norm.value);
      }
      for (auto& group : groups) {
        if (max_grad_norm.has_value() && norm.on_device.defined()) {
          group.options.norm_on_device = norm.on_device.template const_data_ptr<double>();
          group.options.max_norm = *max_grad_norm;
        } else if (max_grad_norm.has_value()) {
          // As torch.nn.utils.clip_grad_norm_ does it. NaN comes through.
          const double factor = *max_grad_norm / (norm.value + 1e-6);
          group.options.gradient_factor *= factor > 1 ? 1 : factor;
        }
      }
    }
    if (!skipped) {
      for (const auto& [device, tensors] : by_device) {
        run(tensors, device, one_by_one);
      }
      for (auto& update : updates) {
        // Autograd must notice that a tensor it saved has changed.
        const auto bump = [](const at::Tensor& tensor) {
          if (tensor.defined() && !tensor.is_inference()) {
            tensor.unsafeGetTensorImpl()->bump_version();
          }
        };
        bump(update.parameter);
        std::for_each(update.buffers.begin(), update.buffers.end(), bump);
        if (Algorithm::kCounts && !update.counts_on_device) {
          *update.count += 1;
        }
      }
    }
  }
  if (!skipped) {
    const size_t states = dict_size(state);
    for (auto& update : updates) {
      keep_buffers(update, state);
    }
    if (dict_size(state) != states) {
      // Others may have added to it, too.
      memory.state_items.clear();
    }
  }
  Object found = Object::borrow(Py_None);
  if (norm.on_device.defined()) {
    found = wrapped(norm.on_device);
  } else if (measured) {
    found = Object::checked(PyFloat_FromDouble(norm.value));
  }
  return Object::checked(PyTuple_Pack(2, found.get(), skipped ? Py_True : Py_False));
}

}  // namespace lightkit
