#include "param_group.h"

#include "../common/checks.h"
#include "../common/python_tensor.h"
#include "../common/tensors.h"

namespace lightkit {

using at::Tensor;

namespace {

// Returns a borrowed reference, or null if there is no such key.
PyObject* find_item(PyObject* group, const char* key) {
  TORCH_CHECK_TYPE(PyDict_Check(group), "a parameter group must be a dict, got ", class_name(group));
  return PyDict_GetItemString(group, key);
}

}  // namespace

Object group_item(PyObject* group, const char* key) {
  PyObject* value = find_item(group, key);
  if (value == nullptr) {
    PyErr_Format(PyExc_KeyError, "a parameter group has no '%s'", key);
    throw PythonError();
  }
  return Object::borrow(value);
}

Tensor number_on_device(PyObject* object) {
  if (!is_tensor(object)) {
    return Tensor();
  }
  const Tensor& tensor = tensor_of(object);
  const bool fits = tensor.is_cuda() && is_plain(tensor) && tensor.scalar_type() == at::kFloat && tensor.numel() == 1;
  return fits ? tensor : Tensor();
}

double group_number(PyObject* group, const char* key) {
  const double value = PyFloat_AsDouble(group_item(group, key).get());
  check_python(value == -1.0);
  return value;
}

bool group_flag(PyObject* group, const char* key) {
  const int value = PyObject_IsTrue(group_item(group, key).get());
  check_python(value < 0);
  return value == 1;
}

uint64_t group_bits(PyObject* group, const char* key) {
  const unsigned long long value = PyLong_AsUnsignedLongLongMask(group_item(group, key).get());
  check_python(value == static_cast<unsigned long long>(-1));
  return value;
}

bool has_group_extra(PyObject* group, const char* key) {
  PyObject* value = find_item(group, key);
  return value != nullptr && value != Py_None && value != Py_False;
}

Object group_parameters(PyObject* group) {
  Object parameters = group_item(group, "params");
  // Any other iterable becomes a list.
  return PyList_Check(parameters.get()) ? parameters : Object::checked(PySequence_List(parameters.get()));
}

const Tensor& unpack_tensor(const Object& object) {
  TORCH_CHECK_TYPE(is_tensor(object.get()), "expected a tensor, got ", class_name(object.get()));
  return tensor_of(object.get());
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
  return empty_like(like, type).copy_(tensor);
}

float* step_counter(const Object& held, c10::Device device) {
  if (!is_tensor(held.get())) {
    return nullptr;
  }
  const Tensor& tensor = tensor_of(held.get());
  const bool fits = is_plain(tensor) && (tensor.is_cpu() || tensor.device() == device) &&
      tensor.scalar_type() == at::kFloat && tensor.numel() == 1;
  return fits ? tensor.mutable_data_ptr<float>() : nullptr;
}

}  // namespace lightkit
