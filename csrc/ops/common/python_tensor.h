// Python's tensor objects, and the translation of errors.
//
// The declarations of torch's functions are repeated here: a file takes 10 s more to compile with torch's header,
// python_variable.h. The linker checks the functions, and `check_tensor_layout` checks the class.
#pragma once

#include "python_object.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Export.h>

#include <exception>

TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& tensor);

namespace torch {
TORCH_PYTHON_API void translate_exception_to_python(const std::exception_ptr& exception);
}

namespace lightkit {

// The beginning of an object of Python's torch.Tensor.
struct TensorObject {
  PyObject_HEAD
  at::Tensor tensor;
};

// Returns true for a torch.Tensor or torch.nn.Parameter, and false for any other subclass.
inline bool is_exact_tensor(PyObject* object) {
  const auto* type = reinterpret_cast<const PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

inline bool is_tensor(PyObject* object) {
  if (is_exact_tensor(object)) {
    return true;
  }
  const int result = PyObject_IsInstance(object, THPVariableClass);
  if (result < 0) {
    throw PythonError();
  }
  return result == 1;
}

// Returns the tensor of an object for which `is_tensor` is true.
inline const at::Tensor& tensor_of(PyObject* object) {
  return reinterpret_cast<const TensorObject*>(object)->tensor;
}

inline Object wrapped(const at::Tensor& tensor) {
  return Object::checked(THPVariable_Wrap(tensor));
}

// Returns what `function` returns. If it throws, sets Python's exception and returns null.
template <typename Function>
PyObject* with_python_errors(const Function& function) {
  try {
    return function();
  } catch (const PythonError&) {
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

// Raises an ImportError if this torch's tensor objects are not laid out as `TensorObject` is.
void check_tensor_layout();

}  // namespace lightkit
