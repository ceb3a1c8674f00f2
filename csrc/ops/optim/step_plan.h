// The step plan of an optimizer: it updates all parameters of the optimizer in one native call.
#pragma once

#include "../../kernels/optim/step.h"
#include "param_group.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace lightkit {

#ifdef LIGHTKIT_CUDA
// Returns true if a CUDA graph captures the current stream.
bool is_capturing();
// Enqueues the norm of gradients on one GPU, times `factor`, divided by `scale[0]` unless `scale` is null. Returns it
// as a float64 scalar on the GPU.
at::Tensor gradient_norm_cuda(
    const std::vector<Gradient>& gradients, c10::Device device, double factor, const float* scale);
#endif

// Lets one step of a plan run at a time. A thread waits for its turn without the GIL, which the running step needs. A
// step that starts within another step of the same thread does not wait.
class Turn {
 public:
  explicit Turn(std::recursive_mutex& mutex) : lock_(mutex, std::try_to_lock) {
    if (!lock_.owns_lock()) {
      const WithoutGil release;
      lock_.lock();
    }
  }

 private:
  std::unique_lock<std::recursive_mutex> lock_;
};

// The arguments of one step.
struct StepRequest {
  PyObject* param_groups;  // a list
  PyObject* state;         // a dict
  std::optional<double> max_grad_norm;
  bool skip_nonfinite;
  double inverse_scale;
  PyObject* grad_scale;  // None, or a tensor on a GPU that divides the gradients
  PyObject* found_inf;   // None, or a tensor on a GPU: the step does nothing unless it is 0
  PyObject* masks;       // None, or a dict of bool tensors by parameter: false where a parameter on the CPU becomes 0

  bool measures_norm() const {
    return max_grad_norm.has_value() || skip_nonfinite;
  }
};

// Remembers the parameters of an optimizer and the objects in its state, so that a step is one call.
//
// A step reads memory, gradients and dtypes anew: a parameter may be moved, re-pointed, frozen or given another
// gradient at any time. It reads the remembered objects again only if the groups list other parameters or the state
// holds other objects.
//
// Threads may share a plan. A step takes the memory out of the plan while it runs, and owns every tensor that it works
// on, whatever others do to the groups and the state.
//
// A step reads the groups (step_read.h), validates each parameter (step_validate.h), launches the kernels
// (step_launch.h), and commits new buffers to the state (step_commit.h).
//
// An Algorithm has: Options (with kStates, see ../../kernels/optim/step.h), kName, kStateNames, kCounts (the state has
// a "step"), kZeroed (new buffers are zeros), read(group) -> Options, uses(options, state), state_type(parameter's
// type, has a master weight), may_start_from_zeros(options) (states of zeros are as good as none), run(tensors,
// device).
template <typename Algorithm>
class StepPlan {
 public:
  // Takes one step. Returns (norm of the gradients, or None if it was not measured; whether the step was skipped).
  //
  // Returns None, and changes nothing, if a parameter is not for this kernel: sparse gradients, another device or
  // dtype, a tensor subclass with a dispatch of its own, memory with gaps.
  //
  // The norm of gradients on a GPU is a tensor there. Only `skip_nonfinite` waits for it.
  Object step(const StepRequest& request);

 private:
  using Options = typename Algorithm::Options;
  using Tensor = StepTensor<Options>;

  // The buffers of a parameter in the optimizer's state: the algorithm's states, the master weight and the average.
  static constexpr size_t kStates = Options::kStates;
  static constexpr size_t kMaster = kStates;
  static constexpr size_t kAverage = kStates + 1;
  static constexpr size_t kSlots = kStates + 2;

  static const char* slot_name(size_t slot) {
    return slot == kMaster ? "master_weight" : slot == kAverage ? "average" : Algorithm::kStateNames[slot];
  }

  // The objects of one parameter. They are not held as tensors: a second owner would keep swap_tensors from working.
  struct Entry {
    Object parameter;
    Object state;                        // the parameter's dict in the optimizer's state, or null
    std::array<Object, kSlots> buffers;  // in `state`: a tensor, None, or null
    Object count;                        // likewise
  };

  // The objects that a plan remembers between steps.
  struct Memory {
    std::vector<std::vector<Entry>> groups;
    std::vector<std::pair<Object, Object>> state_items;
    std::vector<const void*> addresses;  // of the parameters of the previous step
    bool shares_memory = false;          // some of these parameters overlap
  };

  struct Group {
    Options options;
    std::optional<c10::Device> device;  // of the options that are on a GPU; meta if they are on several
    std::array<at::Tensor, 3> numbers;  // these options: the learning rate, grad_scale, found_inf
    bool master_weights;
    bool averaged;
    bool stochastic;
    bool counts_on_device;  // of parameters on a GPU
    uint64_t seed;
  };

  // One parameter's part of a step.
  struct Update {
    Entry* entry = nullptr;
    const Options* options = nullptr;
    at::Tensor parameter;
    at::Tensor gradient;                     // laid out as the parameter
    std::array<at::Tensor, kSlots> buffers;  // laid out as the parameter, or undefined
    at::Tensor mask;                         // likewise
    std::array<bool, kSlots> first{};        // the buffer is new
    bool starts_from_zeros = false;          // new states are zeros, which is as good as none
    at::Tensor new_count;                    // a counter that the state does not have yet
    float* count = nullptr;                  // the counter's memory, on the CPU or on the parameter's device
    bool counts_on_device = false;
    bool master = false;  // has a master weight
    bool stochastic = false;
    uint64_t key = 0;
  };

  // The kernels' arguments for the parameters of one device.
  struct Batch {
    c10::Device device;
    std::vector<Tensor> tensors;
  };

  struct Outcome {
    double norm = 0;            // of all gradients on the CPU
    at::Tensor norm_on_device;  // of all gradients on one GPU
    bool skipped = false;
  };

  // Read.
  static PyObject* find(const Object& state, size_t slot);
  static PyObject* find_count(const Object& state);
  static bool is_current(const Memory& memory, const StepRequest& request);
  static Memory remember(const StepRequest& request);
  static Group read_group(PyObject* group, const StepRequest& request);

  // Validate. The functions that return false found a parameter that is not for this kernel.
  static bool gather(
      Memory& memory, const StepRequest& request, std::vector<Group>& groups, std::vector<Update>& updates);
  static bool gather(Entry& entry, const Group& group, PyObject* masks, std::vector<Update>& updates);
  static at::Tensor find_mask(const Entry& entry, const at::Tensor& parameter, PyObject* masks);
  static bool is_supported(
      const Entry& entry, const Group& group, const at::Tensor& parameter, const at::Tensor& gradient);
  static bool find_counter(Update& update, const Group& group);
  static bool find_buffers(Update& update, const Group& group);
  static void find_buffer(Update& update, size_t slot, at::ScalarType type);
  static void check_gradient(const at::Tensor& parameter, const at::Tensor& gradient);
  static void check_capture(const std::vector<Update>& updates);

  // Launch.
  static Tensor describe(const Update& update);
  static std::vector<Batch> make_batches(const std::vector<Update>& updates);
  static bool shares_memory(Memory& memory, const std::vector<Update>& updates);
  static void measure(
      const StepRequest& request, const std::vector<Batch>& batches, std::vector<Group>& groups, Outcome& outcome);
  static void run(const Batch& batch, bool one_by_one);

  // Commit.
  static void mark_changed(std::vector<Update>& updates);
  static void keep_buffers(Update& update, PyObject* state);
  static void keep(const Object& state, const char* key, Object& held, const at::Tensor& tensor);
  static void commit(Memory& memory, std::vector<Update>& updates, PyObject* state);

  static Object take_step(Memory& memory, const StepRequest& request);

  std::recursive_mutex mutex_;
  Memory memory_;
};

}  // namespace lightkit
