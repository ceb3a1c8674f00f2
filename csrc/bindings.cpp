// The Python module of the native library: what is not an op. Importing it registers the ops.

#include "ops/optim/adam.h"
#include "ops/cross_entropy/cross_entropy_python.h"
#include "ops/common/python_tensor.h"
#include "ops/optim/sgd.h"
#include "ops/common/tensors.h"

#include <new>
#include <optional>

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

// A plan as an object of Python's.
template <typename Plan>
struct PlanObject {
  PyObject_HEAD
  Plan plan;

  static PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
    static char* names[] = {nullptr};
    if (PyArg_ParseTupleAndKeywords(arguments, keywords, "", names) == 0) {
      return nullptr;
    }
    PyObject* self = type->tp_alloc(type, 0);
    if (self != nullptr) {
      new (&reinterpret_cast<PlanObject*>(self)->plan) Plan();
    }
    return self;
  }

  static void destroy(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    reinterpret_cast<PlanObject*>(self)->plan.~Plan();
    type->tp_free(self);
    Py_DECREF(type);
  }

  static PyObject* step(PyObject* self, PyObject* arguments, PyObject* keywords) {
    static const char* names[] = {
        "param_groups",
        "state",
        "max_grad_norm",
        "skip_nonfinite",
        "inverse_scale",
        "grad_scale",
        "found_inf",
        nullptr};
    PyObject *groups, *state, *max_grad_norm, *grad_scale, *found_inf;
    int skip_nonfinite;
    double inverse_scale;
    if (PyArg_ParseTupleAndKeywords(
            arguments,
            keywords,
            "O!O!OpdOO",
            const_cast<char**>(names),
            &PyList_Type,
            &groups,
            &PyDict_Type,
            &state,
            &max_grad_norm,
            &skip_nonfinite,
            &inverse_scale,
            &grad_scale,
            &found_inf) == 0) {
      return nullptr;
    }
    std::optional<double> limit;
    if (max_grad_norm != Py_None) {
      limit = PyFloat_AsDouble(max_grad_norm);
      if (*limit == -1.0 && PyErr_Occurred() != nullptr) {
        return nullptr;
      }
    }
    return with_python_errors([&] {
      Plan& plan = reinterpret_cast<PlanObject*>(self)->plan;
      return plan.step(groups, state, limit, skip_nonfinite != 0, inverse_scale, grad_scale, found_inf).release();
    });
  }
};

template <typename Plan>
Object plan_class(const char* name) {
  using Self = PlanObject<Plan>;
  static PyMethodDef methods[] = {
      {"step",
       reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Self::step)),
       METH_VARARGS | METH_KEYWORDS,
       "Takes one step over all parameters; None, having changed nothing, if some are not for the kernels."},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(Self::make)},
      {Py_tp_dealloc, reinterpret_cast<void*>(Self::destroy)},
      {Py_tp_methods, methods},
      {0, nullptr}};
  PyType_Spec spec{name, sizeof(Self), 0, Py_TPFLAGS_DEFAULT, slots};
  return Object::checked(PyType_FromSpec(&spec));
}

void add(PyObject* module, const char* name, const Object& value) {
  if (PyObject_SetAttrString(module, name, value.get()) != 0) {
    throw PythonError();
  }
}

// The kinds of device that the registered ops have kernels for.
Object devices() {
#ifdef LIGHTKIT_CUDA
  return Object::checked(Py_BuildValue("(ss)", "cpu", "cuda"));
#else
  return Object::checked(Py_BuildValue("(s)", "cpu"));
#endif
}

#define LIGHTKIT_TEXT(text) #text
#define LIGHTKIT_NAME(name) LIGHTKIT_TEXT(name)
#define LIGHTKIT_JOINED(a, b) a##b
#define LIGHTKIT_INIT(name) LIGHTKIT_JOINED(PyInit_, name)

PyModuleDef definition{
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = LIGHTKIT_NAME(LIGHTKIT_MODULE),
    .m_doc = "Native kernels of lightkit, compiled for this machine.",
    .m_size = -1,
};

}  // namespace
}  // namespace lightkit

PyMODINIT_FUNC LIGHTKIT_INIT(LIGHTKIT_MODULE)() {
  using namespace lightkit;
  return with_python_errors([] {
    check_tensor_layout();
    Object module = Object::checked(PyModule_Create(&definition));
    add(module.get(), "SgdPlan", plan_class<SgdPlan>(LIGHTKIT_NAME(LIGHTKIT_MODULE) ".SgdPlan"));
    add(module.get(), "AdamPlan", plan_class<AdamPlan>(LIGHTKIT_NAME(LIGHTKIT_MODULE) ".AdamPlan"));
    add(module.get(), "cross_entropy", cross_entropy_function());
    add(module.get(), "devices", devices());
    return module.release();
  });
}
