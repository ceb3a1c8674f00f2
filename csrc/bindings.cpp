// The Python module of the native library: objects and functions that are not ops. Its import registers the ops.

#include "ops/common/python_tensor.h"
#include "ops/common/tensors.h"
#include "ops/cross_entropy/cross_entropy_python.h"
#include "ops/decode/decoder.h"
#include "ops/optim/adam.h"
#include "ops/optim/sgd.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

namespace py = pybind11;

namespace lightkit {

extern template class StepPlan<SgdAlgorithm>;
extern template class StepPlan<AdamAlgorithm>;

void check_tensor_layout() {
  const at::Tensor tensor = empty({0}, at::kFloat);
  const Object object = wrapped(tensor);
  if (!is_tensor(object.get()) || tensor_of(object.get()).unsafeGetTensorImpl() != tensor.unsafeGetTensorImpl()) {
    PyErr_SetString(PyExc_ImportError, "this torch lays out its tensors' objects in an unknown way");
    throw PythonError();
  }
}

namespace {

// Returns the result of `function` as a pybind11 object, and raises its errors as torch translates them.
template <typename Function>
py::object called(const Function& function) {
  PyObject* result = with_python_errors([&] { return function().release(); });
  if (result == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(result);
}

template <typename Plan>
void bind_plan(py::module_& module, const char* name) {
  const auto step = [](Plan& plan,
                       const py::list& param_groups,
                       const py::dict& state,
                       const py::object& max_grad_norm,
                       bool skip_nonfinite,
                       double inverse_scale,
                       const py::object& grad_scale,
                       const py::object& found_inf,
                       const py::object& masks) {
    const auto limit = max_grad_norm.is_none() ? std::nullopt : std::make_optional(max_grad_norm.cast<double>());
    return called([&] {
      return plan.step({
          .param_groups = param_groups.ptr(),
          .state = state.ptr(),
          .max_grad_norm = limit,
          .skip_nonfinite = skip_nonfinite,
          .inverse_scale = inverse_scale,
          .grad_scale = grad_scale.ptr(),
          .found_inf = found_inf.ptr(),
          .masks = masks.ptr(),
      });
    });
  };
  py::class_<Plan>(module, name)
      .def(py::init<>())
      .def(
          "step",
          step,
          py::arg("param_groups"),
          py::arg("state"),
          py::arg("max_grad_norm"),
          py::arg("skip_nonfinite"),
          py::arg("inverse_scale"),
          py::arg("grad_scale"),
          py::arg("found_inf"),
          py::arg("masks") = py::none());
}

// Returns the decoder that `make` makes, and raises its errors as torch translates them.
template <typename Make>
std::unique_ptr<Decoder> made(const Make& make) {
  std::unique_ptr<Decoder> decoder;
  called([&] {
    decoder = make();
    return Object::borrow(Py_None);
  });
  return decoder;
}

void bind_decoder(py::module_& module) {
  py::class_<Decoder>(module, "Decoder")
      .def(
          "read",
          [](Decoder& decoder, const py::object& tokens, bool every) {
            return called([&] { return decoder.read(tokens.ptr(), every); });
          },
          py::arg("tokens"),
          py::arg("every"))
      .def(
          "extend",
          [](Decoder& decoder,
             const py::object& tokens,
             int64_t count,
             double temperature,
             int64_t top_k,
             const py::object& draws) {
            return called([&] { return decoder.extend(tokens.ptr(), count, {temperature, top_k}, draws.ptr()); });
          },
          py::arg("tokens"),
          py::arg("count"),
          py::arg("temperature"),
          py::arg("top_k"),
          py::arg("draws"))
      .def(
          "reset",
          [](Decoder& decoder) {
            return called([&] {
              decoder.reset();
              return Object::borrow(Py_None);
            });
          })
      .def_property_readonly("position", [](Decoder& decoder) {
        return called([&] { return Object::checked(PyLong_FromLongLong(decoder.position())); });
      });
  module.def(
      "transformer_decoder",
      [](const py::object& embedding,
         const py::object& head,
         const py::object& layers,
         const py::object& norm,
         const py::object& epsilons,
         const py::object& rotation,
         int64_t sequences,
         int64_t weight_bits,
         int64_t cache_bits) {
        return made([&] {
          return make_transformer_decoder(
              embedding.ptr(),
              head.ptr(),
              layers.ptr(),
              norm.ptr(),
              epsilons.ptr(),
              rotation.ptr(),
              sequences,
              weight_bits,
              cache_bits);
        });
      },
      py::arg("embedding"),
      py::arg("head"),
      py::arg("layers"),
      py::arg("norm"),
      py::arg("epsilons"),
      py::arg("rotation"),
      py::arg("sequences"),
      py::arg("weight_bits"),
      py::arg("cache_bits"));
  module.def(
      "recurrent_decoder",
      [](const std::string& cell,
         const py::object& embedding,
         const py::object& head,
         const py::object& layers,
         int64_t sequences,
         int64_t weight_bits) {
        return made([&] {
          return make_recurrent_decoder(cell, embedding.ptr(), head.ptr(), layers.ptr(), sequences, weight_bits);
        });
      },
      py::arg("cell"),
      py::arg("embedding"),
      py::arg("head"),
      py::arg("layers"),
      py::arg("sequences"),
      py::arg("weight_bits"));
}

}  // namespace
}  // namespace lightkit

PYBIND11_MODULE(LIGHTKIT_MODULE, module) {
  using namespace lightkit;
  module.doc() = "Native kernels of lightkit, compiled for this machine.";
  called([] {
    check_tensor_layout();
    return Object::borrow(Py_None);
  });
  bind_plan<SgdPlan>(module, "SgdPlan");
  bind_plan<AdamPlan>(module, "AdamPlan");
  bind_decoder(module);
  module.attr("cross_entropy") = called(cross_entropy_function);
  module.attr("nll_loss") = called(nll_loss_function);
  // The types of the devices that the ops have kernels for.
#ifdef LIGHTKIT_CUDA
  module.attr("devices") = py::make_tuple("cpu", "cuda");
#else
  module.attr("devices") = py::make_tuple("cpu");
#endif
}
