// The Python function of cross-entropy.
#pragma once

#include <Python.h>

namespace lightkit {

// A new reference to it.
PyObject* cross_entropy_function();

}  // namespace lightkit
