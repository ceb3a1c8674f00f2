// Functions that make tensors and compute with them. A file takes 1.5 s more to compile with torch's own headers for
// them, and 6 s more with ATen/ATen.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace lightkit {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_symint(
    at::SymIntArrayRef sizes, const at::TensorOptions& options, std::optional<at::MemoryFormat> format = std::nullopt);
at::Tensor empty_like(
    const at::Tensor& like,
    const at::TensorOptions& options = {},
    std::optional<at::MemoryFormat> format = std::nullopt);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor zeros_like(const at::Tensor& like, const at::TensorOptions& options = {});
at::Tensor full(at::IntArrayRef sizes, double value, const at::TensorOptions& options);
at::Tensor arange(int64_t end, const at::TensorOptions& options);

// Returns an uninitialised contiguous CPU tensor, aligned to 64 bytes. Large memory comes from the pool of buffers.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

inline at::Tensor pooled_empty_like(const at::Tensor& like) {
  return pooled_empty(like.sizes(), like.options());
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
at::Tensor conv2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef padding);
at::Tensor convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups);
at::Tensor max_pool2d(const at::Tensor& input, int64_t size);
at::Tensor fake_quantize(const at::Tensor& input, double scale, int64_t max_level);
at::Tensor leaky_relu(const at::Tensor& input, double slope);
at::Tensor elu(const at::Tensor& input, double alpha);
at::Tensor gelu(const at::Tensor& input, std::string_view approximate);
at::Tensor softplus(const at::Tensor& input, double beta, double threshold);
at::Tensor pad_with_zeros(const at::Tensor& input, at::IntArrayRef padding);

inline at::Tensor operator+(const at::Tensor& a, const at::Tensor& b) {
  return a.add(b);
}
inline at::Tensor operator-(const at::Tensor& a, const at::Tensor& b) {
  return a.sub(b);
}
inline at::Tensor operator*(const at::Tensor& a, const at::Tensor& b) {
  return a.mul(b);
}
inline at::Tensor operator/(const at::Tensor& a, const at::Tensor& b) {
  return a.div(b);
}
inline at::Tensor operator*(const at::Tensor& a, double b) {
  return a.mul(b);
}
inline at::Tensor operator*(double a, const at::Tensor& b) {
  return b.mul(a);
}
inline at::Tensor operator/(const at::Tensor& a, double b) {
  return a.div(b);
}
inline at::Tensor operator-(double a, const at::Tensor& b) {
  return b.neg().add(a);
}

}  // namespace lightkit
