#include "checks.h"
#include "step_plan.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

namespace lightkit {

namespace py = pybind11;
using at::Tensor;

namespace {

// Raises what the interpreter has been told to raise, if it has.
void check_python(bool may_have_failed) {
  if (may_have_failed && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
}

// Null where there is no such key.
PyObject* find_item(const py::handle& group, const char* key) {
  TORCH_CHECK_TYPE(
      PyDict_Check(group.ptr()), "a parameter group must be a dict, got ", std::string(py::str(py::type::of(group))));
  return PyDict_GetItemString(group.ptr(), key);
}

}  // namespace

py::object group_item(const py::handle& group, const char* key) {
  PyObject* value = find_item(group, key);
  if (value == nullptr) {
    throw py::key_error(std::string("a parameter group has no '") + key + "'");
  }
  return py::reinterpret_borrow<py::object>(value);
}

Tensor number_on_device(const py::handle& object) {
  if (!THPVariable_Check(object.ptr())) {
    return Tensor();
  }
  const Tensor& tensor = THPVariable_Unpack(object.ptr());
  const bool fits = tensor.is_cuda() && is_plain(tensor) && tensor.scalar_type() == at::kFloat && tensor.numel() == 1;
  return fits ? tensor : Tensor();
}

double group_number(const py::handle& group, const char* key) {
  const double value = PyFloat_AsDouble(group_item(group, key).ptr());
  check_python(value == -1.0);
  return value;
}

bool group_flag(const py::handle& group, const char* key) {
  const int value = PyObject_IsTrue(group_item(group, key).ptr());
  check_python(value < 0);
  return value == 1;
}

uint64_t group_bits(const py::handle& group, const char* key) {
  const unsigned long long value = PyLong_AsUnsignedLongLongMask(group_item(group, key).ptr());
  check_python(value == static_cast<unsigned long long>(-1));
  return value;
}

bool has_group_extra(const py::handle& group, const char* key) {
  PyObject* value = find_item(group, key);
  return value != nullptr && value != Py_None && value != Py_False;
}

py::list group_parameters(const py::handle& group) {
  const py::object parameters = group_item(group, "params");
  // A list as a rule; anything else that can be iterated over is made one.
  return PyList_Check(parameters.ptr()) ? py::reinterpret_borrow<py::list>(parameters) : py::list(parameters);
}

std::optional<ParameterType> parameter_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ParameterType::Float;
    case at::kDouble:
      return ParameterType::Double;
    case at::kBFloat16:
      return ParameterType::BFloat16;
    case at::kHalf:
      return ParameterType::Half;
    default:
      return std::nullopt;
  }
}

const Tensor& unpack_tensor(const py::object& object) {
  TORCH_CHECK_TYPE(
      THPVariable_Check(object.ptr()), "expected a tensor, got ", std::string(py::str(py::type::of(object))));
  return THPVariable_Unpack(object.ptr());
}

bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet others{c10::DispatchKey::Python, c10::DispatchKey::ZeroTensor};
  if (tensor.layout() != at::kStrided || tensor.is_neg() || tensor.key_set().has_any(others)) {
    return false;
  }
  check_memory("step", "a tensor", tensor);
  return true;
}

Tensor laid_out_as(const Tensor& tensor, const Tensor& like, at::ScalarType type) {
  if (tensor.strides() == like.strides() && tensor.scalar_type() == type && tensor.device() == like.device()) {
    return tensor;
  }
  return at::empty_like(like, type).copy_(tensor);
}

float* step_counter(const py::object& held, c10::Device device) {
  if (!THPVariable_Check(held.ptr())) {
    return nullptr;
  }
  const Tensor& tensor = THPVariable_Unpack(held.ptr());
  const bool fits = is_plain(tensor) && (tensor.is_cpu() || tensor.device() == device) &&
      tensor.scalar_type() == at::kFloat && tensor.numel() == 1;
  return fits ? tensor.mutable_data_ptr<float>() : nullptr;
}

bool has_step_kernels(c10::Device device) {
#ifdef LIGHTKIT_CUDA
  return device.is_cpu() || device.is_cuda();
#else
  return device.is_cpu();
#endif
}

}  // namespace lightkit
