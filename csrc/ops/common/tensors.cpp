#include "tensors.h"

#include "buffer_pool.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/fake_quantize_per_tensor_affine.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace lightkit {

using at::Tensor;

Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  // A small op spends more time in the dispatcher's calls for its results than in its kernel.
  return options.device().is_cpu() ? Tensor(at::detail::empty_cpu(sizes, options)) : at::empty(sizes, options);
}

Tensor empty_symint(
    at::SymIntArrayRef sizes, const at::TensorOptions& options, std::optional<at::MemoryFormat> format) {
  return at::empty_symint(sizes, options, format);
}

Tensor empty_like(const Tensor& like, const at::TensorOptions& options, std::optional<at::MemoryFormat> format) {
  return at::empty_like(like, options, format);
}

Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::zeros(sizes, options);
}

Tensor zeros_like(const Tensor& like, const at::TensorOptions& options) {
  return at::zeros_like(like, options);
}

Tensor full(at::IntArrayRef sizes, double value, const at::TensorOptions& options) {
  return at::full(sizes, value, options);
}

Tensor arange(int64_t end, const at::TensorOptions& options) {
  return at::arange(end, options);
}

Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kMinPooledBytes) {
    return empty(sizes, options);
  }
  const PooledBuffer buffer = take_buffer(bytes);
  return at::from_blob(buffer.data, sizes, [buffer](void*) { give_back_buffer(buffer); }, options);
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  return at::linear(input, weight, bias);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef padding) {
  return at::conv2d(input, weight, bias, 1, padding);
}

Tensor convolution(
    const Tensor& input,
    const Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups) {
  return at::conv2d(input, weight, std::nullopt, stride, padding, dilation, groups);
}

Tensor max_pool2d(const Tensor& input, int64_t size) {
  return at::max_pool2d(input, size);
}

Tensor fake_quantize(const Tensor& input, double scale, int64_t max_level) {
  return at::fake_quantize_per_tensor_affine(input, scale, /*zero_point=*/0, 0, max_level);
}

Tensor leaky_relu(const Tensor& input, double slope) {
  return at::leaky_relu(input, slope);
}

Tensor elu(const Tensor& input, double alpha) {
  return at::elu(input, alpha);
}

Tensor gelu(const Tensor& input, std::string_view approximate) {
  return at::gelu(input, approximate);
}

Tensor softplus(const Tensor& input, double beta, double threshold) {
  return at::softplus(input, beta, threshold);
}

Tensor pad_with_zeros(const Tensor& input, at::IntArrayRef padding) {
  return at::constant_pad_nd(input, padding);
}

}  // namespace lightkit
