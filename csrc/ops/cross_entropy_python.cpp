// lightkit::cross_entropy as a Python function. torch.ops calls the same op, but matches its eleven arguments to the
// schema one by one, which takes longer than a small loss.

#include "cross_entropy_python.h"

#include "cross_entropy.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace lightkit {
namespace {

using at::Tensor;
using CrossEntropy = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, LIGHTKIT_OPTION_PARAMETERS, bool, bool);

constexpr Py_ssize_t kArguments = 11;

const Tensor& tensor(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "cross_entropy: expected a tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) {
    throw python_error();
  }
  return value;
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {
    throw python_error();
  }
  return value;
}

bool flag(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) {
    throw python_error();
  }
  return value == 1;
}

std::optional<at::ScalarType> dtype(PyObject* object) {
  if (object == Py_None) {
    return std::nullopt;
  }
  TORCH_CHECK_TYPE(THPDtype_Check(object), "cross_entropy: dtype must be a torch.dtype, got ", Py_TYPE(object)->tp_name);
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kArguments, "cross_entropy takes ", kArguments, " arguments, got ", count);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lightkit::cross_entropy", "").typed<CrossEntropy>();
  const Tensor& logits = tensor(arguments[0]);
  const Tensor& target = tensor(arguments[1]);
  const auto weight = arguments[2] == Py_None ? std::nullopt : std::optional(tensor(arguments[2]));
  const int64_t reduction = integer(arguments[3]);
  const int64_t ignore_index = integer(arguments[4]);
  const double label_smoothing = number(arguments[5]);
  const double z_loss = number(arguments[6]);
  const double softcap = number(arguments[7]);
  const auto loss_type = dtype(arguments[8]);
  const bool return_lse = flag(arguments[9]);
  const bool inplace = flag(arguments[10]);
  Tensor loss, lse;
  {
    const pybind11::gil_scoped_release release;
    std::tie(loss, lse) = op.call(
        logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, loss_type, return_lse, inplace);
  }
  const auto result = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(loss));
  return return_lse ? PyTuple_Pack(2, result.ptr(), pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(lse)).ptr())
                    : result.inc_ref().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef definition{
    "cross_entropy",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)),
    METH_FASTCALL,
    "The op lightkit::cross_entropy, its arguments by position."};

}  // namespace

PyObject* cross_entropy_function() {
  return PyCFunction_New(&definition, nullptr);
}

}  // namespace lightkit
