// The Python module of the native library: what is not an op. Importing it registers the ops.

#include "ops/adam.h"
#include "ops/cross_entropy_python.h"
#include "ops/sgd.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace lightkit {
extern template class StepPlan<SgdAlgorithm>;
extern template class StepPlan<AdamAlgorithm>;
}  // namespace lightkit

namespace {

template <typename Plan>
void bind_plan(py::module_& m, const char* name) {
  py::class_<Plan>(m, name)
      .def(py::init<>())
      .def(
          "step",
          &Plan::step,
          py::arg("param_groups"),
          py::arg("state"),
          py::arg("max_grad_norm"),
          py::arg("skip_nonfinite"),
          py::arg("inverse_scale"),
          py::arg("grad_scale"),
          py::arg("found_inf"));
}

}  // namespace

PYBIND11_MODULE(LIGHTKIT_MODULE, m) {
  m.doc() = "Native kernels of lightkit, compiled for this machine.";
  bind_plan<lightkit::SgdPlan>(m, "SgdPlan");
  bind_plan<lightkit::AdamPlan>(m, "AdamPlan");
  m.attr("cross_entropy") = py::reinterpret_steal<py::object>(lightkit::cross_entropy_function());
  // The kinds of device that the registered ops have kernels for.
#ifdef LIGHTKIT_CUDA
  m.attr("devices") = py::make_tuple("cpu", "cuda");
#else
  m.attr("devices") = py::make_tuple("cpu");
#endif
}
