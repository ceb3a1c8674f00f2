// Tensors as Python holds them, and errors as Python raises them.
//
// torch's functions for this are declared here anew: its header, python_variable.h, takes every file that includes it
// 10 s to compile. The linker checks the functions, and `check_tensor_layout` the class.
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

// How an object of Python's torch.Tensor begins.
struct TensorObject {
  PyObject_HEAD
  at::Tensor tensor;
};

// Whether it is a tensor or a parameter, and not of a subclass with ways of its own.
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

// Of an object that is a tensor.
inline const at::Tensor& tensor_of(PyObject* object) {
  return reinterpret_cast<const TensorObject*>(object)->tensor;
}

inline Object wrapped(const at::Tensor& tensor) {
  return Object::checked(THPVariable_Wrap(tensor));
}

// Returns what `function` returns, or null where it raises: with its exception as one of Python's.
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

// Raises an ImportError where this torch lays out the objects of its tensors in another way than `TensorObject` has it.
void check_tensor_layout();

}  // namespace lightkit
