// What a step plan does: for the files that make one of an algorithm.
#pragma once

#include "step_plan.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lightkit {

template <typename Algorithm>
bool StepPlan<Algorithm>::is_current(const pybind11::list& param_groups, const pybind11::dict& state) const {
  if (param_groups.size() != groups_.size() || state.size() != state_items_.size()) {
    return false;
  }
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(state.ptr(), &position, &key, &value); ++i) {
    if (key != state_items_[i].first.ptr() || value != state_items_[i].second.ptr()) {
      return false;
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    const pybind11::list parameters = group_parameters(param_groups[g]);
    if (parameters.size() != groups_[g].size()) {
      return false;
    }
    for (size_t i = 0; i < groups_[g].size(); ++i) {
      const Entry& entry = groups_[g][i];
      if (PyList_GET_ITEM(parameters.ptr(), i) != entry.parameter.ptr()) {
        return false;
      }
      if (!entry.state) {
        continue;
      }
      for (size_t slot = 0; slot < kSlots; ++slot) {
        if (find(entry.state, slot) != entry.buffers[slot].ptr()) {
          return false;
        }
      }
      if (Algorithm::kCounts && find_count(entry.state) != entry.count.ptr()) {
        return false;
      }
    }
  }
  return true;
}

template <typename Algorithm>
typename StepPlan<Algorithm>::Group StepPlan<Algorithm>::read_group(
    const pybind11::handle& group,
    double inverse_scale,
    const pybind11::object& grad_scale,
    const pybind11::object& found_inf) {
  const bool averaged = group_extra(group, "ema_decay") != nullptr;
  const bool stochastic = group_extra(group, "stochastic_rounding") != nullptr;
  Options options = Algorithm::read(group);
  options.maximize = group_flag(group, "maximize");
  options.gradient_factor = inverse_scale;
  options.ema_decay = averaged ? group_number(group, "ema_decay") : 0;
  std::optional<c10::Device> device;
  const auto find = [&](PyObject* object) {
    const float* place = number_on_device(object);
    if (place != nullptr) {
      const c10::Device there = THPVariable_Unpack(object).device();
      // No parameter is on a device of this kind: numbers on several devices are not for this kernel.
      device = device.value_or(there) == there ? there : c10::Device(at::kMeta);
    }
    return place;
  };
  options.lr_on_device = find(group_item(group, "lr").ptr());
  options.scale_on_device = find(grad_scale.ptr());
  options.skip_on_device = find(found_inf.ptr());
  return {
      .options = options,
      .device = device,
      .master_weights = group_extra(group, "master_weights") != nullptr,
      .averaged = averaged,
      .stochastic = stochastic,
      // As torch has it.
      .counts_on_device = group_extra(group, "capturable") != nullptr || group_extra(group, "fused") != nullptr,
      .seed = stochastic ? PyLong_AsUnsignedLongLongMask(group_item(group, "rounding_seed").ptr()) : 0,
  };
}

template <typename Algorithm>
void StepPlan<Algorithm>::remember_items(const pybind11::dict& state) {
  state_items_.clear();
  for (const auto& [key, value] : state) {
    state_items_.emplace_back(
        pybind11::reinterpret_borrow<pybind11::object>(key), pybind11::reinterpret_borrow<pybind11::object>(value));
  }
}

template <typename Algorithm>
void StepPlan<Algorithm>::rebuild(const pybind11::list& param_groups, const pybind11::dict& state) {
  const auto borrow = [](PyObject* object) { return pybind11::reinterpret_borrow<pybind11::object>(object); };
  groups_.clear();
  remember_items(state);
  for (const auto& group : param_groups) {
    auto& entries = groups_.emplace_back();
    for (const auto& parameter : group_parameters(group)) {
      Entry entry;
      entry.parameter = borrow(parameter.ptr());
      if (PyDict_Contains(state.ptr(), parameter.ptr()) == 1) {
        entry.state = borrow(PyDict_GetItem(state.ptr(), parameter.ptr()));
        for (size_t slot = 0; slot < kSlots; ++slot) {
          entry.buffers[slot] = borrow(find(entry.state, slot));
        }
        if (Algorithm::kCounts) {
          entry.count = borrow(find_count(entry.state));
        }
      }
      entries.push_back(std::move(entry));
    }
  }
}

// Finds or makes one of the buffers of a parameter.
template <typename Algorithm>
void StepPlan<Algorithm>::use_buffer(Update& update, size_t slot, at::ScalarType type) {
  const pybind11::object& held = update.entry->buffers[slot];
  update.first[slot] = !holds_tensor(held);
  if (update.first[slot]) {
    update.buffers[slot] = Algorithm::kZeroed && slot < kStates ? at::zeros_like(update.parameter, type)
                                                                : at::empty_like(update.parameter, type);
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
  const pybind11::object& held = update.entry->count;
  const c10::Device device = update.parameter.device();
  // Whether a step counts that is left out for what a GPU knows, is known there alone.
  const bool belongs_there = !device.is_cpu() && (group.counts_on_device || group.options.skip_on_device != nullptr);
  if (!holds_tensor(held)) {
    update.new_count = at::zeros({}, at::TensorOptions(at::kFloat).device(belongs_there ? device : c10::Device(at::kCPU)));
    update.count = update.new_count.template mutable_data_ptr<float>();
    update.counts_on_device = belongs_there;
    return true;
  }
  update.count = step_counter(held, device);
  if (update.count == nullptr) {
    return false;
  }
  update.counts_on_device = !unpack_tensor(held).is_cpu();
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
  const at::Tensor& parameter = unpack_tensor(entry.parameter);
  const at::Tensor& gradient = parameter.grad();
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
bool StepPlan<Algorithm>::shares_memory(const std::vector<Update>& updates) {
  const auto lies_there = [](const Update& update, const void* memory) {
    return update.parameter.const_data_ptr() == memory;
  };
  if (std::equal(updates.begin(), updates.end(), memory_.begin(), memory_.end(), lies_there)) {
    return shares_memory_;
  }
  memory_.clear();
  for (const auto& update : updates) {
    memory_.push_back(update.parameter.const_data_ptr());
  }
  std::vector<std::pair<const char*, const char*>> spans;
  for (const auto& update : updates) {
    const auto* begin = static_cast<const char*>(update.parameter.const_data_ptr());
    if (update.parameter.numel() > 0) {
      spans.emplace_back(begin, begin + update.parameter.nbytes());
    }
  }
  std::sort(spans.begin(), spans.end());
  shares_memory_ = std::adjacent_find(spans.begin(), spans.end(), [](const auto& a, const auto& b) {
                     return b.first < a.second;
                   }) != spans.end();
  return shares_memory_;
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
    const pybind11::object& state, const char* key, pybind11::object& place, const at::Tensor& tensor) {
  place = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(tensor));
  if (PyDict_SetItemString(state.ptr(), key, place.ptr()) != 0) {
    throw pybind11::error_already_set();
  }
}

// Puts buffers made in this step where Python, and the next step, find them.
template <typename Algorithm>
void StepPlan<Algorithm>::keep_buffers(Update& update, const pybind11::dict& state) {
  Entry& entry = *update.entry;
  const auto owner = [&]() -> const pybind11::object& {
    if (!entry.state) {
      // Through __getitem__: the state of an optimizer is a defaultdict.
      entry.state = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetItem(state.ptr(), entry.parameter.ptr()));
      if (!entry.state) {
        throw pybind11::error_already_set();
      }
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
pybind11::object StepPlan<Algorithm>::step(
    const pybind11::list& param_groups,
    const pybind11::dict& state,
    std::optional<double> max_grad_norm,
    bool skip_nonfinite,
    double inverse_scale,
    const pybind11::object& grad_scale,
    const pybind11::object& found_inf) {
  if (!is_current(param_groups, state)) {
    rebuild(param_groups, state);
  }
  std::vector<Group> groups;
  groups.reserve(groups_.size());
  std::vector<Update> updates;
  updates.reserve(std::accumulate(groups_.begin(), groups_.end(), size_t{0}, [](size_t sum, const auto& entries) {
    return sum + entries.size();
  }));
  for (size_t g = 0; g < groups_.size(); ++g) {
    groups.push_back(read_group(param_groups[g], inverse_scale, grad_scale, found_inf));
    for (auto& entry : groups_[g]) {
      if (!gather(entry, groups.back(), updates)) {
        return pybind11::none();
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
    return pybind11::none();
  }
  const bool one_by_one = shares_memory(updates);
  Norm norm;
  bool skipped = false;
  {
    pybind11::gil_scoped_release release;
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
    const size_t states = state.size();
    for (auto& update : updates) {
      keep_buffers(update, state);
    }
    if (state.size() != states) {
      remember_items(state);
    }
  }
  pybind11::object found = pybind11::none();
  if (norm.on_device.defined()) {
    found = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(norm.on_device));
  } else if (measured) {
    found = pybind11::float_(norm.value);
  }
  return pybind11::make_tuple(found, skipped);
}

}  // namespace lightkit
