// Reads Python's side of an optimizer: parameter groups, and the tensors in them and in its state.
//
// The caller owns a reference to each object that it uses. Another thread may change groups and state whenever Python
// code runs, such as the hash of a tensor.
#pragma once

#include "../common/python_object.h"

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lightkit {

// Returns the value of a key of a parameter group. Raises a KeyError if there is none.
Object group_item(PyObject* group, const char* key);
// Returns the lowest 64 bits of an integer.
uint64_t group_bits(PyObject* group, const char* key);
// Returns a number that float() takes, a tensor of one element included.
double group_number(PyObject* group, const char* key);
bool group_flag(PyObject* group, const char* key);
// Returns true if an option that torch's groups do not have is there, and neither None nor False.
bool has_group_extra(PyObject* group, const char* key);
// Returns the parameters of a group as a list.
Object group_parameters(PyObject* group);

// Returns the tensor of an object. Raises a TypeError for any other object.
const at::Tensor& unpack_tensor(const Object& object);
inline bool holds_tensor(const Object& object) {
  return object && !object.is_none();
}
// Returns true if the memory of a tensor holds its values: not for a subclass such as DTensor, whose storage is
// elsewhere, not with a pending negation, and not for zeros without memory. Raises a ValueError for a tensor that
// reaches beyond its storage.
bool is_plain(const at::Tensor& tensor);
// Returns `tensor` as `type`, with the device and the strides of `like`, which is dense.
at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type);
// Returns a float32 tensor of one element on a GPU; an undefined tensor for any other object.
at::Tensor number_on_device(PyObject* object);
// Returns the memory of a counter of steps, float32 on the CPU or on `device`; null for any other object.
float* step_counter(const Object& held, c10::Device device);

}  // namespace lightkit
