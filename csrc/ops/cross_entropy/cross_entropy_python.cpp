// A fast path from Python to lightkit::cross_entropy for plain tensors, and the negative log-likelihood of a
// log-softmax. torch.ops calls the same op, except that the checks in Python and the match of eleven arguments with the
// schema take longer than a small loss.

#include "cross_entropy_python.h"

#include "../common/checks.h"
#include "../common/element_type.h"
#include "../common/python_tensor.h"
#include "cross_entropy_checks.h"
#include "nll_loss.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>

namespace at::autocast {
// Repeats torch's declaration: its header takes 8 s to compile.
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
}  // namespace at::autocast

namespace lightkit {
namespace {

using at::Tensor;

constexpr Py_ssize_t kArguments = 11;

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  check_python(value == -1);
  return value;
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  check_python(value == -1.0);
  return value;
}

bool flag(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  check_python(value < 0);
  return value == 1;
}

// Returns true if torch.func or a mode of torch.overrides must see the call.
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      at::impl::torch_function_mode_enabled();
}

// Returns true if the call needs a derivative that the kernels do not have: they have the gradient of the logits alone.
bool has_other_derivatives(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight) {
  return target.requires_grad() || (weight.has_value() && weight->requires_grad()) ||
      logits._fw_grad(/*level=*/0).defined();
}

// Returns the loss or (loss, lse), and NotImplemented outside of the common case, for mistakes, too.
PyObject* call(PyObject* const* arguments, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == kArguments, "cross_entropy takes ", kArguments, " arguments, got ", count);
  if (!is_exact_tensor(arguments[0]) || !is_exact_tensor(arguments[1]) ||
      !(arguments[2] == Py_None || is_exact_tensor(arguments[2])) ||
      !(arguments[8] == Py_None || THPDtype_Check(arguments[8])) || is_transformed()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& logits = tensor_of(arguments[0]);
  if (!has_kernels(logits.device())) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& target = tensor_of(arguments[1]);
  const auto weight = arguments[2] == Py_None ? std::nullopt : std::optional(tensor_of(arguments[2]));
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
  if (!element_type(logits.scalar_type()) || !at::isIntegralType(target.scalar_type(), /*includeBool=*/false) ||
      has_other_derivatives(logits, target, weight) || reduction < 0 || !(softcap >= 0) ||
      (dtype.has_value() && !at::isFloatingType(*dtype))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor loss, lse;
  {
    const WithoutGil release;
    std::tie(loss, lse) = call_cross_entropy(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, inplace);
  }
  Object result = wrapped(loss);
  return return_lse ? PyTuple_Pack(2, result.get(), wrapped(lse).get()) : result.release();
}

PyObject* call_from_python(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors([&] { return call(arguments, count); });
}

PyMethodDef definition{
    "cross_entropy",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_from_python)),
    METH_FASTCALL,
    "The op lightkit::cross_entropy, its arguments by position."};

// Returns the loss of log-probabilities that the caller knows to be the result of a log-softmax over the classes, and
// NotImplemented where torch computes the loss, and for mistakes.
PyObject* call_nll_loss(PyObject* const* arguments, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == 5, "nll_loss takes 5 arguments, got ", count);
  if (!is_exact_tensor(arguments[0]) || !is_exact_tensor(arguments[1]) ||
      !(arguments[2] == Py_None || is_exact_tensor(arguments[2])) || is_transformed()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor& log_probabilities = tensor_of(arguments[0]);
  const Tensor& target = tensor_of(arguments[1]);
  const auto weight = arguments[2] == Py_None ? std::nullopt : std::optional(tensor_of(arguments[2]));
  const int64_t reduction = integer(arguments[3]);
  const int64_t ignore_index = integer(arguments[4]);
  const auto type = log_probabilities.scalar_type();
  if (!at::GradMode::is_enabled() || !log_probabilities.is_cpu() || (type != at::kFloat && type != at::kDouble) ||
      log_probabilities.dim() == 0 || log_probabilities.numel() == 0 || log_probabilities.grad_fn() == nullptr ||
      // A change in place gives a tensor another version.
      log_probabilities._version() != 0 || at::autocast::is_autocast_enabled(at::kCPU) || reduction < 0 ||
      target.scalar_type() != at::kLong || !target.is_cpu() ||
      target.sizes() != without_classes(log_probabilities, log_probabilities.sizes()) ||
      (weight.has_value() && (weight->scalar_type() != type || weight->dim() != 1)) ||
      has_other_derivatives(log_probabilities, target, weight)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor loss;
  {
    const WithoutGil release;
    loss = nll_loss_of_log_softmax(log_probabilities, target, weight, reduction, ignore_index);
  }
  return wrapped(loss).release();
}

PyObject* call_nll_loss_from_python(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors([&] { return call_nll_loss(arguments, count); });
}

PyMethodDef nll_loss_definition{
    "nll_loss",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_nll_loss_from_python)),
    METH_FASTCALL,
    "The negative log-likelihood of a log-softmax: log-probabilities, target, weight, reduction, ignore_index."};

}  // namespace

Object nll_loss_function() {
  return Object::checked(PyCFunction_New(&nll_loss_definition, nullptr));
}

Object cross_entropy_function() {
  return Object::checked(PyCFunction_New(&definition, nullptr));
}

}  // namespace lightkit
