// The third part of a step: it describes the parameters to the kernels, measures the norm of the gradients, and runs
// the kernels.
#pragma once

#include "../common/element_type.h"
#include "step_plan.h"

#include <algorithm>
#include <cmath>

namespace lightkit {

template <typename Algorithm>
typename StepPlan<Algorithm>::Tensor StepPlan<Algorithm>::describe(const Update& update) {
  const auto memory = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  Tensor tensor{
      .parameter = update.parameter.mutable_data_ptr(),
      .gradient = update.gradient.const_data_ptr(),
      .states = {},
      .master = static_cast<float*>(memory(update.buffers[kMaster])),
      .average = memory(update.buffers[kAverage]),
      .mask = update.mask.defined() ? static_cast<const uint8_t*>(update.mask.const_data_ptr()) : nullptr,
      .numel = update.parameter.numel(),
      .type = *element_type(update.parameter.scalar_type()),
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

// Groups the parameters by device; most optimizers have one.
template <typename Algorithm>
std::vector<typename StepPlan<Algorithm>::Batch> StepPlan<Algorithm>::make_batches(const std::vector<Update>& updates) {
  std::vector<Batch> batches;
  for (const auto& update : updates) {
    const c10::Device device = update.parameter.device();
    auto found =
        std::find_if(batches.begin(), batches.end(), [&](const Batch& batch) { return batch.device == device; });
    if (found == batches.end()) {
      found = batches.insert(found, {device, {}});
      found->tensors.reserve(updates.size());
    }
    found->tensors.push_back(describe(update));
  }
  return batches;
}

// Returns true if two parameters overlap in memory, so that their updates must run one after the other. Looks again
// only if a parameter has moved, or other parameters have gradients.
template <typename Algorithm>
bool StepPlan<Algorithm>::shares_memory(Memory& memory, const std::vector<Update>& updates) {
  auto& addresses = memory.addresses;
  const auto is_at = [](const Update& update, const void* address) {
    return update.parameter.const_data_ptr() == address;
  };
  if (std::equal(updates.begin(), updates.end(), addresses.begin(), addresses.end(), is_at)) {
    return memory.shares_memory;
  }
  addresses.clear();
  for (const auto& update : updates) {
    addresses.push_back(update.parameter.const_data_ptr());
  }
  std::vector<std::pair<const char*, const char*>> spans;
  for (const auto& update : updates) {
    const auto* begin = static_cast<const char*>(update.parameter.const_data_ptr());
    if (update.parameter.numel() > 0) {
      spans.emplace_back(begin, begin + update.parameter.nbytes());
    }
  }
  std::sort(spans.begin(), spans.end());
  const auto overlap = [](const auto& a, const auto& b) { return b.first < a.second; };
  memory.shares_memory = std::adjacent_find(spans.begin(), spans.end(), overlap) != spans.end();
  return memory.shares_memory;
}

// Measures the norm of all gradients, and applies it: to the factor of the gradients, and to the decision to skip.
template <typename Algorithm>
void StepPlan<Algorithm>::measure(
    const StepRequest& request, const std::vector<Batch>& batches, std::vector<Group>& groups, Outcome& outcome) {
  std::vector<Gradient> gradients;
  for (const auto& batch : batches) {
    for (const auto& tensor : batch.tensors) {
      gradients.push_back({tensor.gradient, tensor.numel, tensor.type});
    }
  }
  const double factor = std::abs(request.inverse_scale);
  const bool on_cpu = batches.empty() || batches[0].device.is_cpu();
  if (on_cpu) {
    outcome.norm = std::sqrt(cpu::optim::square_sum(gradients)) * factor;
  }
#ifdef LIGHTKIT_CUDA
  if (!on_cpu) {
    outcome.norm_on_device =
        gradient_norm_cuda(gradients, batches[0].device, factor, groups[0].options.scale_on_device);
  }
#endif
  if (request.skip_nonfinite) {
    outcome.skipped = !std::isfinite(on_cpu ? outcome.norm : outcome.norm_on_device.template item<double>());
  }
  if (!request.max_grad_norm.has_value()) {
    return;
  }
  for (auto& group : groups) {
    if (on_cpu) {
      // As in torch.nn.utils.clip_grad_norm_; NaN if the norm is NaN.
      const double clip = *request.max_grad_norm / (outcome.norm + 1e-6);
      group.options.gradient_factor *= clip > 1 ? 1 : clip;
    } else {
      group.options.norm_on_device = outcome.norm_on_device.template const_data_ptr<double>();
      group.options.max_norm = *request.max_grad_norm;
    }
  }
}

template <typename Algorithm>
void StepPlan<Algorithm>::run(const Batch& batch, bool one_by_one) {
  if (!one_by_one) {
    return Algorithm::run(batch.tensors, batch.device);
  }
  for (const auto& tensor : batch.tensors) {
    Algorithm::run({tensor}, batch.device);
  }
}

}  // namespace lightkit
