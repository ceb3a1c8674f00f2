// The last part of a step: it tells autograd about changed tensors, and commits new buffers to the optimizer's state.
#pragma once

#include "step_read.h"

#include <algorithm>

namespace lightkit {

// Counts the step, and bumps the versions of the changed tensors, so that autograd notices if it saved one of them.
template <typename Algorithm>
void StepPlan<Algorithm>::mark_changed(std::vector<Update>& updates) {
  const auto bump = [](const at::Tensor& tensor) {
    if (tensor.defined() && !tensor.is_inference()) {
      tensor.unsafeGetTensorImpl()->bump_version();
    }
  };
  for (auto& update : updates) {
    bump(update.parameter);
    std::for_each(update.buffers.begin(), update.buffers.end(), bump);
    if (Algorithm::kCounts && !update.counts_on_device) {
      *update.count += 1;
    }
  }
}

template <typename Algorithm>
void StepPlan<Algorithm>::keep(const Object& state, const char* key, Object& held, const at::Tensor& tensor) {
  held = wrapped(tensor);
  if (PyDict_SetItemString(state.get(), key, held.get()) != 0) {
    throw PythonError();
  }
}

// Puts the new counter and buffers of a parameter into the optimizer's state.
template <typename Algorithm>
void StepPlan<Algorithm>::keep_buffers(Update& update, PyObject* state) {
  Entry& entry = *update.entry;
  const auto owner = [&]() -> const Object& {
    if (!entry.state) {
      // As the defaultdict of an optimizer's state does.
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
void StepPlan<Algorithm>::commit(Memory& memory, std::vector<Update>& updates, PyObject* state) {
  const size_t states = dict_size(state);
  for (auto& update : updates) {
    keep_buffers(update, state);
  }
  if (dict_size(state) != states) {
    // Other threads may have added to the state, too: the next step reads it again.
    memory.state_items.clear();
  }
}

}  // namespace lightkit
