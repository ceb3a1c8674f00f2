// The Python module of the native library: what is not an op. Importing it registers the ops.

#include "ops/cross_entropy_python.h"
#include "ops/sgd.h"

#include <pybind11/stl.h>

namespace py = pybind11;

PYBIND11_MODULE(LIGHTKIT_MODULE, m) {
  m.doc() = "Native kernels of lightkit, compiled for this machine.";
  py::class_<lightkit::SgdPlan>(m, "SgdPlan")
      .def(py::init<>())
      .def(
          "step",
          &lightkit::SgdPlan::step,
          py::arg("param_groups"),
          py::arg("state"),
          py::arg("max_grad_norm"),
          py::arg("skip_nonfinite"),
          py::arg("inverse_scale"));
  m.attr("cross_entropy") = py::reinterpret_steal<py::object>(lightkit::cross_entropy_function());
  // The kinds of device that the registered ops have kernels for.
#ifdef LIGHTKIT_CUDA
  m.attr("devices") = py::make_tuple("cpu", "cuda");
#else
  m.attr("devices") = py::make_tuple("cpu");
#endif
}
