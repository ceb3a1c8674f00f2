#include "sgd.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
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

// One of the options that the groups of torch's SGD do not have, or null where it is not set.
PyObject* extra(const py::handle& group, const char* key) {
  PyObject* value = PyDict_GetItemString(group.ptr(), key);
  return value == nullptr || value == Py_None || value == Py_False ? nullptr : value;
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

// `tensor` as `type`, with the device and the order of elements in memory of `like`, which is dense.
Tensor laid_out_as(const Tensor& tensor, const Tensor& like, at::ScalarType type) {
  if (tensor.strides() == like.strides() && tensor.scalar_type() == type && tensor.device() == like.device()) {
    return tensor;
  }
  return at::empty_like(like, type).copy_(tensor);
}

bool is_half(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf;
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
      for (int slot = 0; entry.state && slot < kSlots; ++slot) {
        if (PyDict_GetItemString(entry.state.ptr(), kNames[slot]) != entry.buffers[slot].ptr()) {
          return false;
        }
      }
    }
  }
  return true;
}

SgdPlan::Group SgdPlan::read_group(const py::handle& group, double inverse_scale) {
  const bool averaged = extra(group, "ema_decay") != nullptr;
  const bool stochastic = extra(group, "stochastic_rounding") != nullptr;
  return {
      .options =
          {
              .lr = number(group, "lr"),
              .momentum = number(group, "momentum"),
              .dampening = number(group, "dampening"),
              .weight_decay = number(group, "weight_decay"),
              .nesterov = flag(group, "nesterov"),
              .maximize = flag(group, "maximize"),
              .ema_decay = averaged ? number(group, "ema_decay") : 0,
              .gradient_factor = inverse_scale,
          },
      .master_weights = extra(group, "master_weights") != nullptr,
      .averaged = averaged,
      .stochastic = stochastic,
      .seed = stochastic ? PyLong_AsUnsignedLongLongMask(item(group, "rounding_seed").ptr()) : 0,
  };
}

void SgdPlan::remember_items(const py::dict& state) {
  state_items_.clear();
  for (const auto& [key, value] : state) {
    state_items_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
  }
}

void SgdPlan::rebuild(const py::list& param_groups, const py::dict& state) {
  groups_.clear();
  remember_items(state);
  for (const auto& group : param_groups) {
    auto& entries = groups_.emplace_back();
    for (const auto& parameter : parameters_of(group)) {
      Entry entry;
      entry.parameter = py::reinterpret_borrow<py::object>(parameter);
      if (PyDict_Contains(state.ptr(), parameter.ptr()) == 1) {
        entry.state = py::reinterpret_borrow<py::object>(PyDict_GetItem(state.ptr(), parameter.ptr()));
        for (int slot = 0; slot < kSlots; ++slot) {
          entry.buffers[slot] =
              py::reinterpret_borrow<py::object>(PyDict_GetItemString(entry.state.ptr(), kNames[slot]));
        }
      }
      entries.push_back(std::move(entry));
    }
  }
}

// Finds or makes one of the buffers of a parameter.
void SgdPlan::use_buffer(Update& update, Slot slot, at::ScalarType type) {
  const py::object& held = update.entry->buffers[slot];
  update.first[slot] = !holds_tensor(held);
  if (update.first[slot]) {
    update.buffers[slot] = at::empty_like(update.parameter, type);
    return;
  }
  const Tensor& buffer = unpack(held);
  TORCH_CHECK(
      buffer.sizes() == update.parameter.sizes(),
      "SGD: a parameter of shape ",
      update.parameter.sizes(),
      " has a ",
      kNames[slot],
      " of shape ",
      buffer.sizes());
  update.buffers[slot] = laid_out_as(buffer, update.parameter, type);
}

// Adds what is to be done for one parameter; false if that is not for this kernel.
bool SgdPlan::gather(Entry& entry, const Group& group, std::vector<Update>& updates) {
  Update update{.entry = &entry, .options = &group.options};
  update.parameter = unpack(entry.parameter);
  const Tensor& parameter = update.parameter;
  const Tensor& gradient = parameter.grad();
  if (!gradient.defined()) {
    return true;
  }
  const auto type = parameter.scalar_type();
  if (!is_plain(parameter) || !is_plain(gradient) || !has_kernel(parameter.device()) ||
      gradient.device() != parameter.device() || !kernel_type(type) || !parameter.is_non_overlapping_and_dense()) {
    return false;
  }
  for (const auto& held : entry.buffers) {
    if (holds_tensor(held) && !is_plain(unpack(held))) {
      return false;
    }
  }
  const bool master = group.master_weights && is_half(type);
  update.stochastic = group.stochastic && !master && type == at::kBFloat16;
  if (!parameter.is_cpu() && (master || group.averaged || update.stochastic)) {
    return false;
  }
  TORCH_CHECK(
      gradient.sizes() == parameter.sizes(),
      "SGD: a parameter of shape ",
      parameter.sizes(),
      " has a gradient of shape ",
      gradient.sizes());
  update.gradient = laid_out_as(gradient, parameter, type);
  if (group.options.momentum != 0) {
    use_buffer(update, Momentum, master ? at::kFloat : type);
  }
  if (master) {
    use_buffer(update, Master, at::kFloat);
    Tensor& weight = update.buffers[Master];
    // Whoever wrote into the parameter since the last step meant it to count.
    const bool written = entry.version.has_value() && !parameter.is_inference() && *entry.version != parameter._version();
    if (update.first[Master] || (written && !at::equal(weight.to(type), parameter))) {
      weight.copy_(parameter.detach());
    }
  }
  if (group.averaged) {
    use_buffer(update, Average, type == at::kDouble ? at::kDouble : at::kFloat);
  }
  if (update.stochastic) {
    // Another sequence for each step and each place in it: odd factors spread both over all bits.
    update.key = group.seed * 0x9e3779b97f4a7c15u + updates.size() * 0xbf58476d1ce4e5b9u;
  }
  updates.push_back(std::move(update));
  return true;
}

// Puts buffers made in this step where Python, and the next step, find them.
void SgdPlan::keep_buffers(Update& update, const py::dict& state) {
  Entry& entry = *update.entry;
  for (int slot = 0; slot < kSlots; ++slot) {
    const Tensor& buffer = update.buffers[slot];
    if (!buffer.defined() || (!update.first[slot] && buffer.is_same(unpack(entry.buffers[slot])))) {
      continue;
    }
    if (!entry.state) {
      // Through __getitem__: the state of an optimizer is a defaultdict.
      entry.state = py::reinterpret_steal<py::object>(PyObject_GetItem(state.ptr(), entry.parameter.ptr()));
      if (!entry.state) {
        throw py::error_already_set();
      }
    }
    entry.buffers[slot] = py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer));
    if (PyDict_SetItemString(entry.state.ptr(), kNames[slot], entry.buffers[slot].ptr()) != 0) {
      throw py::error_already_set();
    }
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

py::object SgdPlan::step(
    const py::list& param_groups,
    const py::dict& state,
    std::optional<double> max_grad_norm,
    bool skip_nonfinite,
    double inverse_scale) {
  if (!is_current(param_groups, state)) {
    rebuild(param_groups, state);
  }
  std::vector<Group> groups;
  groups.reserve(groups_.size());
  std::vector<Update> updates;
  for (size_t g = 0; g < groups_.size(); ++g) {
    groups.push_back(read_group(param_groups[g], inverse_scale));
    for (auto& entry : groups_[g]) {
      if (!gather(entry, groups.back(), updates)) {
        return py::none();
      }
    }
  }

  std::map<c10::Device, std::vector<SgdTensor>, DeviceOrder> by_device;
  for (const auto& update : updates) {
    const auto& [momentum, master, average] = update.buffers;
    by_device[update.parameter.device()].push_back({
        .parameter = update.parameter.mutable_data_ptr(),
        .gradient = update.gradient.const_data_ptr(),
        .momentum = momentum.defined() ? momentum.mutable_data_ptr() : nullptr,
        .master = master.defined() ? master.mutable_data_ptr<float>() : nullptr,
        .average = average.defined() ? average.mutable_data_ptr() : nullptr,
        .numel = update.parameter.numel(),
        .type = *kernel_type(update.parameter.scalar_type()),
        .first = update.first[Momentum],
        .first_average = update.first[Average],
        .stochastic = update.stochastic,
        .key = update.key,
        .options = update.options,
    });
  }
  const bool measured = max_grad_norm.has_value() || skip_nonfinite;
  const auto on_cpu = [](const auto& item) { return item.first.is_cpu(); };
  if (measured && !std::all_of(by_device.begin(), by_device.end(), on_cpu)) {
    return py::none();
  }
  const bool one_by_one = shares_memory(updates);
  double norm = 0;
  bool skipped = false;
  {
    py::gil_scoped_release release;
    if (measured) {
      for (const auto& [device, tensors] : by_device) {
        norm += cpu::gradient_square_sum(tensors);
      }
      norm = std::sqrt(norm) * std::abs(inverse_scale);
      skipped = skip_nonfinite && !std::isfinite(norm);
      if (max_grad_norm.has_value()) {
        // As torch.nn.utils.clip_grad_norm_ does it. NaN comes through.
        const double factor = *max_grad_norm / (norm + 1e-6);
        for (auto& group : groups) {
          group.options.gradient_factor *= factor > 1 ? 1 : factor;
        }
      }
    }
    if (!skipped) {
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
        const auto bump = [](const Tensor& tensor) {
          if (tensor.defined() && !tensor.is_inference()) {
            tensor.unsafeGetTensorImpl()->bump_version();
          }
        };
        bump(update.parameter);
        std::for_each(update.buffers.begin(), update.buffers.end(), bump);
        if (!update.parameter.is_inference()) {
          update.entry->version = update.parameter._version();
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
  return py::make_tuple(measured ? py::object(py::float_(norm)) : py::none(), skipped);
}

}  // namespace lightkit
