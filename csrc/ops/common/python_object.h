// Owners of Python objects and of the GIL. pybind11 has them, too, except that a file takes 4 s more to compile with
// it.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>

namespace lightkit {

// Thrown after a call of Python's C API has failed: the interpreter holds the exception.
struct PythonError {};

// Throws a PythonError if the interpreter holds an exception. A call whose result cannot be an error passes false.
inline void check_python(bool may_have_failed) {
  if (may_have_failed && PyErr_Occurred() != nullptr) {
    throw PythonError();
  }
}

// Owns a reference to a Python object, or to none.
class Object {
 public:
  Object() = default;
  Object(const Object& other) : object_(Py_XNewRef(other.object_)) {}
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() {
    Py_XDECREF(object_);
  }

  static Object borrow(PyObject* object) {
    return steal(Py_XNewRef(object));
  }
  static Object steal(PyObject* object) {
    Object result;
    result.object_ = object;
    return result;
  }
  // Owns the result of a call that returns a new reference. Throws a PythonError for null.
  static Object checked(PyObject* result) {
    if (result == nullptr) {
      throw PythonError();
    }
    return steal(result);
  }

  PyObject* get() const {
    return object_;
  }
  PyObject* release() {
    return std::exchange(object_, nullptr);
  }
  explicit operator bool() const {
    return object_ != nullptr;
  }
  bool is_none() const {
    return object_ == Py_None;
  }

 private:
  PyObject* object_ = nullptr;
};

// Returns an item of a list, which other threads may have shortened. Throws a PythonError beyond its end.
inline Object list_item(PyObject* list, Py_ssize_t index) {
  return Object::checked(Py_XNewRef(PyList_GetItem(list, index)));
}

// Returns the class of an object, as error messages show it.
inline std::string class_name(PyObject* object) {
  const Object shown = Object::checked(PyObject_Str(reinterpret_cast<PyObject*>(Py_TYPE(object))));
  const char* text = PyUnicode_AsUTF8(shown.get());
  if (text == nullptr) {
    throw PythonError();
  }
  return text;
}

// Releases the GIL while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace lightkit
