// The short way from Python to lightkit::cross_entropy, for plain tensors. torch.ops calls the same op, but asking
// in Python whether it may be called, and matching eleven arguments to its schema, takes longer than a small loss.

#include "cross_entropy_python.h"

#include "cross_entropy.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
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

// Whether it is a tensor or a parameter, and not of a subclass with ways of its own.
bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object);
}

bool is_type_of_kernels(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

bool is_device_of_kernels(c10::Device device) {
#ifdef LIGHTKIT_CUDA
  return device.is_cpu() || device.is_cuda();
#else
  return device.is_cpu();
#endif
}

// Whether torch.func or a mode of torch.overrides is to see what is called.
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      at::impl::torch_function_mode_enabled();
}

// The kernels know the gradient with respect to the logits alone, and no tangents.
bool has_other_derivatives(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight) {
  return target.requires_grad() || (weight.has_value() && weight->requires_grad()) ||
      logits._fw_grad(/*level=*/0).defined();
}

// The loss, or (loss, lse); NotImplemented for whatever is not the common case, mistakes included.
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kArguments, "cross_entropy takes ", kArguments, " arguments, got ", count);
  if (!is_plain(arguments[0]) || !is_plain(arguments[1]) || !(arguments[2] == Py_None || is_plain(arguments[2])) ||
      !(arguments[8] == Py_None || THPDtype_Check(arguments[8])) || is_transformed()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& logits = THPVariable_Unpack(arguments[0]);
  if (!is_device_of_kernels(logits.device())) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& target = THPVariable_Unpack(arguments[1]);
  const auto weight = arguments[2] == Py_None ? std::nullopt : std::optional(THPVariable_Unpack(arguments[2]));
  const int64_t reduction = integer(arguments[3]);
  const int64_t ignore_index = integer(arguments[4]);
  const double label_smoothing = number(arguments[5]);
  const double z_loss = number(arguments[6]);
  const double softcap = number(arguments[7]);
  std::optional<at::ScalarType> dtype;
  if (arguments[8] != Py_None) {
    dtype = reinterpret_cast<THPDtype*>(arguments[8])->scalar_type;
  } else if (logits.scalar_type() != at::kDouble && at::autocast::is_autocast_enabled(logits.device().type())) {
    dtype = at::kFloat;
  }
  const bool return_lse = flag(arguments[9]);
  const bool inplace = flag(arguments[10]);
  if (!is_type_of_kernels(logits.scalar_type()) || !at::isIntegralType(target.scalar_type(), /*includeBool=*/false) ||
      has_other_derivatives(logits, target, weight) || reduction < 0 || !(softcap >= 0) ||
      (dtype.has_value() && !at::isFloatingType(*dtype))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lightkit::cross_entropy", "").typed<CrossEntropy>();
  Tensor loss, lse;
  {
    const pybind11::gil_scoped_release release;
    std::tie(loss, lse) = op.call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, inplace);
  }
  if (!return_lse) {
    return THPVariable_Wrap(loss);
  }
  return pybind11::make_tuple(
             pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(loss)),
             pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(lse)))
      .release()
      .ptr();
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
