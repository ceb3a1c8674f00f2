// The step plan of an optimizer: what one native call needs to know to update all of its parameters.
#pragma once

#include "../../kernels/step.h"
#include "../common/python_object.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace lightkit {

// Reading Python's side of an optimizer. What is read is owned while it is used: wherever Python code runs, such as in
// the hash of a tensor or for the value of one, another thread may change the groups and the state.

// A key of a parameter group, which must be there.
Object group_item(PyObject* group, const char* key);
// An integer, of which the lowest 64 bits count.
uint64_t group_bits(PyObject* group, const char* key);
// Any number, a one-element tensor included, which is what float() takes.
double group_number(PyObject* group, const char* key);
bool group_flag(PyObject* group, const char* key);
// Whether one of the options that torch's groups do not have is set.
bool has_group_extra(PyObject* group, const char* key);
Object group_parameters(PyObject* group);

std::optional<ParameterType> parameter_type(at::ScalarType type);
const at::Tensor& unpack_tensor(const Object& object);
inline bool holds_tensor(const Object& object) {
  return object && !object.is_none();
}
// Whether a tensor's memory is what it stands for: not that of a subclass such as DTensor, whose storage is
// elsewhere, not with a negation still to be applied, and not zeros without any. Raises where it reaches beyond its
// storage.
bool is_plain(const at::Tensor& tensor);
// `tensor` as `type`, with the device and the order of elements in memory of `like`, which is dense.
at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type);
// A number that lies on a GPU: a float32 tensor of one element there; undefined for any other object.
at::Tensor number_on_device(PyObject* object);
// Where a parameter's count of steps is kept: float32 on the CPU or on the parameter's device; null for anything else.
float* step_counter(const Object& held, c10::Device device);
// Whether there are kernels of the steps for a device.
bool has_step_kernels(c10::Device device);
#ifdef LIGHTKIT_CUDA
// Whether what is enqueued now goes into a CUDA graph.
bool is_capturing();
// The norm of gradients that all lie on one GPU, times `factor`, divided by what lies at `scale` if that is not null: a
// float64 scalar there, for which nobody has waited.
at::Tensor gradient_norm_cuda(
    const std::vector<Gradient>& gradients, c10::Device device, double factor, const float* scale);
#endif

// Lets one step of a plan run at a time. Who waits for its turn holds no GIL: the one that it waits for needs it to get
// done. A step that Python code in another step of the same thread takes need not wait.
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

// Holds the parameters of an optimizer and where their buffers lie, so that a step is one call.
//
// Memory, gradients and dtypes are read anew at every step: a parameter may be moved, re-pointed, frozen or
// given another gradient at any time. What is remembered is read again only when the groups list other parameters
// or the optimizer's state holds other objects.
//
// Threads may share a plan. A step takes what is remembered out of the plan for as long as it runs, and owns every
// tensor that it works on: whatever others do meanwhile to the groups and the state, its memory stays.
//
// An Algorithm has: Options (with kStates, see ../../kernels/step.h), kName, kStateNames, kCounts (whether the state
// has a "step"), kZeroed (whether buffers begin as zeros), read(group) -> Options, uses(options, state),
// state_type(parameter's type, whether there is a master weight), may_start_from_zeros(options): whether states of zeros
// are as good as none, run(tensors, device).
template <typename Algorithm>
class StepPlan {
 public:
  // One step over `param_groups`, a list, with the buffers in `state`, a dict. Returns (norm of the gradients or None where nobody
  // asked, whether the step was skipped); or None, having changed nothing, if some parameter is not for this
  // kernel: sparse gradients, another device or dtype, a tensor subclass with a dispatch of its own, memory with
  // gaps. `grad_scale` and `found_inf` are None, or tensors on a GPU that the step divides the gradients by and is left
  // out for, without anyone waiting for them. The norm of gradients on a GPU is a tensor there; only skip_nonfinite
  // waits for it.
  Object step(
      PyObject* param_groups,
      PyObject* state,
      std::optional<double> max_grad_norm,
      bool skip_nonfinite,
      double inverse_scale,
      PyObject* grad_scale,
      PyObject* found_inf);

 private:
  using Options = typename Algorithm::Options;
  using Tensor = StepTensor<Options>;

  // The tensors that a parameter may have in the optimizer's state: the algorithm's, and these.
  static constexpr size_t kStates = Options::kStates;
  static constexpr size_t kMaster = kStates;
  static constexpr size_t kAverage = kStates + 1;
  static constexpr size_t kSlots = kStates + 2;

  static const char* slot_name(size_t slot) {
    return slot == kMaster ? "master_weight" : slot == kAverage ? "average" : Algorithm::kStateNames[slot];
  }

  // The entry of a parameter's state, or null.
  static PyObject* find(const Object& state, size_t slot) {
    // Looked up for every parameter at every step: as strings that need not be made each time.
    static const auto keys = [] {
      std::array<PyObject*, kSlots> made;
      for (size_t i = 0; i < kSlots; ++i) {
        made[i] = PyUnicode_InternFromString(slot_name(i));
      }
      return made;
    }();
    return PyDict_GetItem(state.get(), keys[slot]);
  }

  static PyObject* find_count(const Object& state) {
    static PyObject* const key = PyUnicode_InternFromString("step");
    return PyDict_GetItem(state.get(), key);
  }

  struct Entry {
    // As Python holds them, not as tensors: a second owner would stand in the way of swap_tensors.
    Object parameter;
    Object state;                         // the parameter's dict in the optimizer's state, or null
    std::array<Object, kSlots> buffers;   // in it: a tensor, None, or null
    Object count;                         // in it, likewise
  };

  // What is known from one step to the next.
  struct Memory {
    std::vector<std::vector<Entry>> groups;
    std::vector<std::pair<Object, Object>> state_items;
    std::vector<const void*> places;  // where the parameters of the last step lay, and whether some share memory
    bool shares_memory = false;
  };

  struct Group {
    Options options;
    std::optional<c10::Device> device;  // the one that some of the options are on
    std::array<at::Tensor, 3> numbers;  // the options that are on it: the learning rate, the scale, what was found
    bool master_weights;
    bool averaged;
    bool stochastic;
    bool counts_on_device;  // where the parameter is on a GPU
    uint64_t seed;
  };

  // The norm of all gradients: in `value`, or on the GPU where they are.
  struct Norm {
    double value = 0;
    at::Tensor on_device;
  };

  // What a step does to one parameter.
  struct Update {
    Entry* entry = nullptr;
    const Options* options = nullptr;
    at::Tensor parameter;
    at::Tensor gradient;                      // laid out as the parameter
    std::array<at::Tensor, kSlots> buffers;   // likewise, or undefined
    std::array<bool, kSlots> first{};         // the buffer holds nothing yet
    bool starts_from_zeros = false;           // the states do, which is as good
    at::Tensor new_count;                     // the counter, where this is the parameter's first step
    float* count = nullptr;                   // it, on the CPU or with the parameter
    bool counts_on_device = false;
    bool stochastic = false;
    uint64_t key = 0;
  };

  static bool is_current(const Memory& memory, PyObject* param_groups, PyObject* state);
  static Memory remember(PyObject* param_groups, PyObject* state);
  static Object take_step(
      Memory& memory,
      PyObject* param_groups,
      PyObject* state,
      std::optional<double> max_grad_norm,
      bool skip_nonfinite,
      double inverse_scale,
      PyObject* grad_scale,
      PyObject* found_inf);
  static Group read_group(
      PyObject* group,
      double inverse_scale,
      PyObject* grad_scale,
      PyObject* found_inf);
  static bool gather(Entry& entry, const Group& group, std::vector<Update>& updates);
  static void check_capture(const std::vector<Update>& updates);
  static bool find_counter(Update& update, const Group& group);
  static void use_buffer(Update& update, size_t slot, at::ScalarType type);
  static Tensor describe(const Update& update);
  static bool shares_memory(Memory& memory, const std::vector<Update>& updates);
  static Norm measure(
      const std::vector<std::pair<c10::Device, std::vector<Tensor>>>& by_device,
      double inverse_scale,
      const float* scale_on_device);
  static void run(const std::vector<Tensor>& tensors, c10::Device device, bool one_by_one);
  static void keep_buffers(Update& update, PyObject* state);
  static void keep(const Object& state, const char* key, Object& place, const at::Tensor& tensor);

  std::recursive_mutex mutex_;
  Memory memory_;
};

}  // namespace lightkit
