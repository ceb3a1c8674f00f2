// The steps of a step plan, for the files that instantiate it for an algorithm.
#pragma once

#include "step_commit.h"
#include "step_launch.h"
#include "step_read.h"
#include "step_validate.h"

#include <utility>

namespace lightkit {

template <typename Algorithm>
Object StepPlan<Algorithm>::step(const StepRequest& request) {
  const auto is_number = [](PyObject* number) { return number == Py_None || number_on_device(number).defined(); };
  TORCH_CHECK_TYPE(
      is_number(request.grad_scale) && is_number(request.found_inf),
      Algorithm::kName,
      ": grad_scale and found_inf must be None or float32 tensors of one element on a GPU, got ",
      class_name(request.grad_scale),
      " and ",
      class_name(request.found_inf));
  TORCH_CHECK_TYPE(
      request.masks == Py_None || PyDict_Check(request.masks),
      Algorithm::kName,
      ": masks must be None or a dict, got ",
      class_name(request.masks));
  const Turn turn(mutex_);
  Memory memory = std::exchange(memory_, {});
  if (!is_current(memory, request)) {
    memory = remember(request);
  }
  Object outcome = take_step(memory, request);
  // Swapped: the plan holds nothing old while Python destroys the old objects.
  std::swap(memory_, memory);
  return outcome;
}

template <typename Algorithm>
Object StepPlan<Algorithm>::take_step(Memory& memory, const StepRequest& request) {
  // Read and validate.
  std::vector<Group> groups;
  std::vector<Update> updates;
  if (!gather(memory, request, groups, updates)) {
    return Object::borrow(Py_None);
  }
  check_capture(updates);

  // Launch.
  const auto batches = make_batches(updates);
  if (request.measures_norm() && batches.size() > 1) {
    return Object::borrow(Py_None);
  }
  const bool one_by_one = shares_memory(memory, updates);
  Outcome outcome;
  {
    const WithoutGil release;
    if (request.measures_norm()) {
      measure(request, batches, groups, outcome);
    }
    if (!outcome.skipped) {
      for (const auto& batch : batches) {
        run(batch, one_by_one);
      }
      mark_changed(updates);
    }
  }

  // Commit.
  if (!outcome.skipped) {
    commit(memory, updates, request.state);
  }
  Object norm = Object::borrow(Py_None);
  if (outcome.norm_on_device.defined()) {
    norm = wrapped(outcome.norm_on_device);
  } else if (request.measures_norm()) {
    norm = Object::checked(PyFloat_FromDouble(outcome.norm));
  }
  return Object::checked(PyTuple_Pack(2, norm.get(), outcome.skipped ? Py_True : Py_False));
}

}  // namespace lightkit
