#include "sgd.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

namespace lightkit {
namespace {

namespace py = pybind11;
using at::Tensor;

py::handle item(const py::handle& dict, const char* key) {
  PyObject* value = PyDict_GetItemString(dict.ptr(), key);
  if (value == nullptr) {
    throw py::key_error(std::string("SGD: a parameter group has no '") + key + "'");
  }
  return value;
}

// Any number, a one-element tensor included, which is what float() takes.
double number(const py::handle& group, const char* key) {
  const double value = PyFloat_AsDouble(item(group, key).ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    throw py::error_already_set();
  }
  return value;
}

bool flag(const py::handle& group, const char* key) {
  return PyObject_IsTrue(item(group, key).ptr()) == 1;
}

SgdOptions options_of(const py::handle& group) {
  return {
      .lr = number(group, "lr"),
      .momentum = number(group, "momentum"),
      .dampening = number(group, "dampening"),
      .weight_decay = number(group, "weight_decay"),
      .nesterov = flag(group, "nesterov"),
      .maximize = flag(group, "maximize"),
  };
}

std::optional<SgdType> kernel_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return SgdType::Float;
    case at::kDouble:
      return SgdType::Double;
    case at::kBFloat16:
      return SgdType::BFloat16;
    case at::kHalf:
      return SgdType::Half;
    default:
      return std::nullopt;
  }
}

struct DeviceOrder {
  bool operator()(c10::Device a, c10::Device b) const {
    return std::pair(a.type(), a.index()) < std::pair(b.type(), b.index());
  }
};

bool has_kernel(c10::Device device) {
#ifdef LIGHTKIT_CUDA
  return device.is_cpu() || device.is_cuda();
#else
  return device.is_cpu();
#endif
}

void run(const std::vector<SgdTensor>& tensors, c10::Device device) {
#ifdef LIGHTKIT_CUDA
  if (device.is_cuda()) {
    return sgd_cuda(tensors, device);
  }
#endif
  TORCH_INTERNAL_ASSERT(device.is_cpu());
  cpu::sgd(tensors);
}

// `tensor` with the dtype, device and order of elements in memory of `like`, which is dense.
Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (tensor.strides() == like.strides() && tensor.scalar_type() == like.scalar_type() &&
      tensor.device() == like.device()) {
    return tensor;
  }
  return at::empty_like(like).copy_(tensor);
}

py::list parameters_of(const py::handle& group) {
  const py::handle parameters = item(group, "params");
  // A list as a rule; anything else that can be iterated over is made one.
  return PyList_Check(parameters.ptr()) ? py::reinterpret_borrow<py::list>(parameters)
                                       : py::list(py::reinterpret_borrow<py::object>(parameters));
}

const Tensor& unpack(const py::object& object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), "SGD: expected a tensor, got ", std::string(py::str(py::type::of(object))));
  return THPVariable_Unpack(object.ptr());
}

bool holds_tensor(const py::object& object) {
  return object && !object.is_none();
}

// Whether a tensor's memory is what it stands for: not that of a subclass such as DTensor, whose storage is
// elsewhere, and not with a negation still to be applied.
bool is_plain(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_neg() && !tensor.key_set().has(c10::DispatchKey::Python);
}

}  // namespace

bool SgdPlan::is_current(const py::list& param_groups, const py::dict& state) const {
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
    const py::list parameters = parameters_of(param_groups[g]);
    if (parameters.size() != groups_[g].size()) {
      return false;
    }
    for (size_t i = 0; i < groups_[g].size(); ++i) {
      const Entry& entry = groups_[g][i];
      if (PyList_GET_ITEM(parameters.ptr(), i) != entry.parameter.ptr()) {
        return false;
      }
      if (entry.state && PyDict_GetItemString(entry.state.ptr(), "momentum_buffer") != entry.momentum.ptr()) {
        return false;
      }
    }
  }
  return true;
}

void SgdPlan::rebuild(const py::list& param_groups, const py::dict& state) {
  groups_.clear();
  state_items_.clear();
  for (const auto& [key, value] : state) {
    state_items_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
  }
  for (const auto& group : param_groups) {
    auto& entries = groups_.emplace_back();
    for (const auto& parameter : parameters_of(group)) {
      Entry entry;
      entry.parameter = py::reinterpret_borrow<py::object>(parameter);
      if (PyDict_Contains(state.ptr(), parameter.ptr()) == 1) {
        entry.state = py::reinterpret_borrow<py::object>(PyDict_GetItem(state.ptr(), parameter.ptr()));
        entry.momentum =
            py::reinterpret_borrow<py::object>(PyDict_GetItemString(entry.state.ptr(), "momentum_buffer"));
      }
      entries.push_back(std::move(entry));
    }
  }
}

// Adds what is to be done for one parameter; false if that is not for this kernel.
bool SgdPlan::gather(Entry& entry, const SgdOptions& options, std::vector<Update>& updates) {
  Update update;
  update.entry = &entry;
  update.options = &options;
  update.parameter = unpack(entry.parameter);
  const Tensor& parameter = update.parameter;
  const Tensor& gradient = parameter.grad();
  if (!gradient.defined()) {
    return true;
  }
  if (!is_plain(parameter) || !is_plain(gradient) || !has_kernel(parameter.device()) ||
      gradient.device() != parameter.device() || !kernel_type(parameter.scalar_type()) ||
      !parameter.is_non_overlapping_and_dense()) {
    return false;
  }
  TORCH_CHECK(
      gradient.sizes() == parameter.sizes(),
      "SGD: a parameter of shape ",
      parameter.sizes(),
      " has a gradient of shape ",
      gradient.sizes());
  update.gradient = laid_out_as(gradient, parameter);
  update.first = !holds_tensor(entry.momentum);
  if (options.momentum != 0) {
    if (update.first) {
      update.momentum = at::empty_like(parameter);
    } else {
      const Tensor& momentum = unpack(entry.momentum);
      if (!is_plain(momentum)) {
        return false;
      }
      TORCH_CHECK(
          momentum.sizes() == parameter.sizes(),
          "SGD: a parameter of shape ",
          parameter.sizes(),
          " has a momentum buffer of shape ",
          momentum.sizes());
      update.momentum = laid_out_as(momentum, parameter);
    }
  }
  updates.push_back(std::move(update));
  return true;
}

// Puts a buffer made in this step where Python, and the next step, find it.
void SgdPlan::keep_momentum(Update& update, const py::dict& state) {
  Entry& entry = *update.entry;
  if (!update.momentum.defined() || (!update.first && update.momentum.is_same(unpack(entry.momentum)))) {
    return;
  }
  if (!entry.state) {
    // Through __getitem__: the state of an optimizer is a defaultdict.
    entry.state = py::reinterpret_steal<py::object>(PyObject_GetItem(state.ptr(), entry.parameter.ptr()));
    if (!entry.state) {
      throw py::error_already_set();
    }
  }
  entry.momentum = py::reinterpret_steal<py::object>(THPVariable_Wrap(update.momentum));
  if (PyDict_SetItemString(entry.state.ptr(), "momentum_buffer", entry.momentum.ptr()) != 0) {
    throw py::error_already_set();
  }
}

// Whether two parameters lie in the same memory, so that their updates must come one after the other. Looked
// at again only when a parameter has moved.
bool SgdPlan::shares_memory(const std::vector<Update>& updates) {
  bool moved = false;
  for (const auto& update : updates) {
    const void* memory = update.parameter.const_data_ptr();
    moved |= update.entry->memory != memory;
    update.entry->memory = memory;
  }
  if (!moved) {
    return shares_memory_;
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

bool SgdPlan::step(const py::list& param_groups, const py::dict& state) {
  if (!is_current(param_groups, state)) {
    rebuild(param_groups, state);
  }
  std::vector<SgdOptions> options;
  options.reserve(groups_.size());
  std::vector<Update> updates;
  for (size_t g = 0; g < groups_.size(); ++g) {
    options.push_back(options_of(param_groups[g]));
    for (auto& entry : groups_[g]) {
      if (!gather(entry, options.back(), updates)) {
        return false;
      }
    }
  }

  std::map<c10::Device, std::vector<SgdTensor>, DeviceOrder> by_device;
  for (const auto& update : updates) {
    by_device[update.parameter.device()].push_back({
        .parameter = update.parameter.mutable_data_ptr(),
        .gradient = update.gradient.const_data_ptr(),
        .momentum = update.momentum.defined() ? update.momentum.mutable_data_ptr() : nullptr,
        .numel = update.parameter.numel(),
        .type = *kernel_type(update.parameter.scalar_type()),
        .first = update.first,
        .options = update.options,
    });
  }
  const bool one_by_one = shares_memory(updates);
  {
    py::gil_scoped_release release;
    for (const auto& [device, tensors] : by_device) {
      if (one_by_one) {
        for (const auto& tensor : tensors) {
          run({tensor}, device);
        }
      } else {
        run(tensors, device);
      }
    }
    for (auto& update : updates) {
      // Autograd must notice that a tensor it saved has changed.
      if (!update.parameter.is_inference()) {
        update.parameter.unsafeGetTensorImpl()->bump_version();
      }
      if (update.momentum.defined() && !update.momentum.is_inference()) {
        update.momentum.unsafeGetTensorImpl()->bump_version();
      }
    }
  }
  const size_t states = state.size();
  for (auto& update : updates) {
    keep_momentum(update, state);
  }
  if (state.size() != states) {
    state_items_.clear();
    for (const auto& [key, value] : state) {
      state_items_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    }
  }
  return true;
}

}  // namespace lightkit
