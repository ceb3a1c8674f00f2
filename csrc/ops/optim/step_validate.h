// The second part of a step: it validates each parameter, and finds or makes its counter and buffers.
#pragma once

#include "../common/checks.h"
#include "../common/element_type.h"
#include "../common/tensors.h"
#include "step_read.h"

#include <algorithm>
#include <numeric>

namespace lightkit {

template <typename Algorithm>
bool StepPlan<Algorithm>::gather(
    Memory& memory, const StepRequest& request, std::vector<Group>& groups, std::vector<Update>& updates) {
  groups.reserve(memory.groups.size());
  const auto count = [](size_t sum, const auto& entries) { return sum + entries.size(); };
  updates.reserve(std::accumulate(memory.groups.begin(), memory.groups.end(), size_t{0}, count));
  for (size_t g = 0; g < memory.groups.size(); ++g) {
    groups.push_back(read_group(list_item(request.param_groups, g).get(), request));
    for (auto& entry : memory.groups[g]) {
      if (!gather(entry, groups.back(), request.masks, updates)) {
        return false;
      }
    }
  }
  return true;
}

// Adds the update of one parameter, if it has a gradient.
template <typename Algorithm>
bool StepPlan<Algorithm>::gather(Entry& entry, const Group& group, PyObject* masks, std::vector<Update>& updates) {
  const at::Tensor parameter = unpack_tensor(entry.parameter);
  const at::Tensor gradient = parameter.grad();
  if (!gradient.defined()) {
    return true;
  }
  if (!is_supported(entry, group, parameter, gradient)) {
    return false;
  }
  const auto type = parameter.scalar_type();
  Update& update = updates.emplace_back();
  update.entry = &entry;
  update.options = &group.options;
  update.parameter = parameter;
  update.master = group.master_weights && (type == at::kBFloat16 || type == at::kHalf);
  update.stochastic = group.stochastic && !update.master && type == at::kBFloat16;
  if (Algorithm::kCounts && !find_counter(update, group)) {
    return false;
  }
  check_gradient(parameter, gradient);
  update.gradient = laid_out_as(gradient, parameter, type);
  update.mask = find_mask(entry, parameter, masks);
  if (!find_buffers(update, group)) {
    return false;
  }
  if (update.stochastic) {
    // Each step and each parameter has another key: odd factors spread both over all bits.
    update.key = group.seed * 0x9e3779b97f4a7c15u + (updates.size() - 1) * 0xbf58476d1ce4e5b9u;
  }
  return true;
}

// Returns the mask of a parameter on the CPU; an undefined tensor without one.
template <typename Algorithm>
at::Tensor StepPlan<Algorithm>::find_mask(const Entry& entry, const at::Tensor& parameter, PyObject* masks) {
  if (masks == Py_None || !parameter.is_cpu()) {
    return at::Tensor();
  }
  const Object held = Object::borrow(PyDict_GetItemWithError(masks, entry.parameter.get()));
  if (!held) {
    check_python(true);
    return at::Tensor();
  }
  const at::Tensor& mask = unpack_tensor(held);
  TORCH_CHECK(
      mask.sizes() == parameter.sizes() && mask.scalar_type() == at::kBool && mask.is_cpu() && is_plain(mask),
      Algorithm::kName,
      ": a parameter of shape ",
      parameter.sizes(),
      " has a mask of shape ",
      mask.sizes(),
      " and dtype ",
      mask.scalar_type());
  return laid_out_as(mask, parameter, at::kBool);
}

template <typename Algorithm>
bool StepPlan<Algorithm>::is_supported(
    const Entry& entry, const Group& group, const at::Tensor& parameter, const at::Tensor& gradient) {
  const c10::Device device = parameter.device();
  if (!is_plain(parameter) || !is_plain(gradient) || !has_kernels(device) || gradient.device() != device ||
      group.device.value_or(device) != device || !element_type(parameter.scalar_type()) ||
      !parameter.is_non_overlapping_and_dense()) {
    return false;
  }
  return std::all_of(entry.buffers.begin(), entry.buffers.end(), [](const Object& held) {
    return !holds_tensor(held) || is_plain(unpack_tensor(held));
  });
}

template <typename Algorithm>
void StepPlan<Algorithm>::check_gradient(const at::Tensor& parameter, const at::Tensor& gradient) {
  TORCH_CHECK(
      gradient.sizes() == parameter.sizes(),
      Algorithm::kName,
      ": a parameter of shape ",
      parameter.sizes(),
      " has a gradient of shape ",
      gradient.sizes());
}

// Finds or makes the counter of a parameter's steps.
template <typename Algorithm>
bool StepPlan<Algorithm>::find_counter(Update& update, const Group& group) {
  const Object& held = update.entry->count;
  const c10::Device device = update.parameter.device();
  // If the GPU decides whether a step is skipped, only the GPU knows whether the step counts.
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

// Finds or makes the states, the master weight and the average of a parameter.
template <typename Algorithm>
bool StepPlan<Algorithm>::find_buffers(Update& update, const Group& group) {
  const auto type = update.parameter.scalar_type();
  for (size_t slot = 0; slot < kStates; ++slot) {
    if (Algorithm::uses(group.options, slot)) {
      find_buffer(update, slot, Algorithm::state_type(type, update.master));
    }
  }
  if (update.first[0] && group.options.skip_on_device != nullptr) {
    // The host does not know whether the step is skipped, which would leave new states uninitialised.
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
  if (update.master) {
    find_buffer(update, kMaster, at::kFloat);
    if (update.first[kMaster]) {
      update.buffers[kMaster].copy_(update.parameter.detach());
    }
  }
  if (group.averaged) {
    find_buffer(update, kAverage, type == at::kDouble ? at::kDouble : at::kFloat);
    if (update.first[kAverage] && group.options.skip_on_device != nullptr) {
      // A skipped step would leave a new average uninitialised, too.
      return false;
    }
  }
  return true;
}

template <typename Algorithm>
void StepPlan<Algorithm>::find_buffer(Update& update, size_t slot, at::ScalarType type) {
  const Object& held = update.entry->buffers[slot];
  update.first[slot] = !holds_tensor(held);
  if (update.first[slot]) {
    update.buffers[slot] =
        Algorithm::kZeroed && slot < kStates ? zeros_like(update.parameter, type) : empty_like(update.parameter, type);
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

// Raises for a captured step that a CUDA graph cannot repeat: the graph repeats its launches, with the decisions that
// the host made for the captured step.
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

}  // namespace lightkit
