// The step plan of lightkit.optim.SGD: what one native call needs to know of an optimizer.
#pragma once

#include "../kernels/sgd.h"

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace lightkit {

// Updates tensors that all lie on one GPU, on its current stream.
void sgd_cuda(const std::vector<SgdTensor>& tensors, c10::Device device);

// Holds the parameters of an optimizer and where their buffers lie, so that a step is one call.
//
// Memory, gradients and dtypes are read anew at every step: a parameter may be moved, re-pointed, frozen or
// given another gradient at any time. The plan itself is rebuilt only when the groups list other parameters
// or the optimizer's state holds other objects.
class SgdPlan {
 public:
  // One step over `param_groups` (those of lightkit.optim.SGD), with the buffers in `state`. Returns (norm of
  // the gradients or None where nobody asked, whether the step was skipped); or None, having changed nothing,
  // if some parameter is not for this kernel: sparse gradients, another device or dtype, a tensor subclass with
  // a dispatch of its own, memory with gaps.
  pybind11::object step(
      const pybind11::list& param_groups,
      const pybind11::dict& state,
      std::optional<double> max_grad_norm,
      bool skip_nonfinite,
      double inverse_scale);

 private:
  // The tensors that a parameter may have in the optimizer's state.
  enum Slot { Momentum, Master, Average, kSlots };
  static constexpr std::array<const char*, kSlots> kNames{"momentum_buffer", "master_weight", "average"};

  struct Entry {
    // As Python holds them, not as tensors: a second owner would stand in the way of swap_tensors.
    pybind11::object parameter;
    pybind11::object state;                         // the parameter's dict in the optimizer's state, or null
    std::array<pybind11::object, kSlots> buffers;   // in it: a tensor, None, or null
    const void* memory = nullptr;                   // where the parameter lay in the last step
    std::optional<uint32_t> version;                // of the parameter after the last step
  };

  // What a step does to one parameter.
  struct Update {
    Entry* entry;
    const SgdOptions* options;
    at::Tensor parameter;
    at::Tensor gradient;                      // laid out as the parameter
    std::array<at::Tensor, kSlots> buffers;   // likewise, or undefined
    std::array<bool, kSlots> first;           // the buffer holds nothing yet
    bool stochastic;
    uint64_t key;
  };

  struct Group {
    SgdOptions options;
    bool master_weights;
    bool averaged;
    bool stochastic;
    uint64_t seed;
  };

  static Group read_group(const pybind11::handle& group, double inverse_scale);
  bool is_current(const pybind11::list& param_groups, const pybind11::dict& state) const;
  void rebuild(const pybind11::list& param_groups, const pybind11::dict& state);
  void remember_items(const pybind11::dict& state);
  static bool gather(Entry& entry, const Group& group, std::vector<Update>& updates);
  static void use_buffer(Update& update, Slot slot, at::ScalarType type);
  static void keep_buffers(Update& update, const pybind11::dict& state);
  bool shares_memory(const std::vector<Update>& updates);

  std::vector<std::vector<Entry>> groups_;
  std::vector<std::pair<pybind11::object, pybind11::object>> state_items_;
  bool shares_memory_ = false;
};

}  // namespace lightkit
