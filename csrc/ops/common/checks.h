// Checks of single arguments, and access to them, for all ops.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/safe_numerics.h>

#include <initializer_list>
#include <optional>

namespace lightkit {

// Returns true if the library has kernels for a device.
inline bool has_kernels(c10::Device device) {
#ifdef LIGHTKIT_CUDA
  return device.is_cpu() || device.is_cuda();
#else
  return device.is_cpu();
#endif
}

// Returns true if an optional tensor is given.
inline bool is_there(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

// Returns true if the elements of a strided tensor lie within its storage, which may have been resized.
inline bool lies_in_storage(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return true;
  }
  const auto offset = static_cast<size_t>(tensor.storage_offset());
  const size_t end = tensor.is_contiguous()
      ? (offset + static_cast<size_t>(tensor.numel())) * tensor.itemsize()
      : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(), offset);
  return end <= tensor.storage().nbytes();
}

// Raises a ValueError for a tensor whose storage ends before its elements do. torch's functions do not check it.
inline void check_memory(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      lies_in_storage(tensor),
      op,
      ": ",
      name,
      " of shape ",
      tensor.sizes(),
      " reaches beyond its storage of ",
      tensor.storage().nbytes(),
      " bytes");
}

inline void check_memory(const char* op, const char* name, const std::optional<at::Tensor>& tensor) {
  if (is_there(tensor)) {
    check_memory(op, name, *tensor);
  }
}

// Raises an error for a tensor of another dtype or device than the input. `op` and `name` begin the message.
template <typename Op>
void check_same_kind(const Op& op, const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type() && tensor.device() == input.device(),
      op,
      ": ",
      name,
      " must be of the dtype and on the device of the input, ",
      input.scalar_type(),
      " on ",
      input.device(),
      ", got ",
      tensor.scalar_type(),
      " on ",
      tensor.device());
}

inline void check_single_or_double(const char* op, const at::Tensor& input) {
  TORCH_CHECK(
      input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble,
      op,
      ": the input must be float32 or float64, got ",
      input.scalar_type());
}

// Returns the product as a double, because it may overflow any integer; 0 if a size is a symbol.
inline double product(std::initializer_list<c10::SymInt> sizes) {
  double result = 1;
  for (const c10::SymInt& size : sizes) {
    result *= static_cast<double>(size.maybe_as_int().value_or(0));
  }
  return result;
}

// Returns the product of some of a tensor's sizes. Raises a ValueError for a product of 2^63 or more, which is possible
// if another size is 0.
inline int64_t checked_product(const char* op, at::IntArrayRef sizes) {
  int64_t product = 1;
  bool overflows = false;
  for (const int64_t size : sizes) {
    overflows = overflows || c10::mul_overflows(product, size, &product);
  }
  TORCH_CHECK_VALUE(!overflows, op, ": sizes of fewer than 2^63 elements are supported, got ", sizes);
  return product;
}

// Returns the elements of a tensor, or null for an undefined one.
template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

}  // namespace lightkit
