// lightkit::_fake_quantize_weights_: checks, the Meta kernel, and the op on a CPU.

#include "fake_quantize.h"

#include "../../kernels/cpu/fake_quantize/fake_quantize.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace lightkit {

using at::Tensor;
using at::TensorList;

namespace {

constexpr auto kOp = "_fake_quantize_weights_";

// Raises for arguments that do not fit, and returns the number of rows of all tensors.
c10::SymInt check_rows(TensorList weights, TensorList outputs, int64_t bits) {
  TORCH_CHECK_VALUE(bits == 2 || bits == 3 || bits == 4 || bits == 8, kOp, ": bits must be 2, 3, 4 or 8, got ", bits);
  TORCH_CHECK_VALUE(
      !weights.empty() && weights.size() == outputs.size(),
      kOp,
      ": there must be at least one weight, and an output for each of the ",
      weights.size(),
      " weights, got ",
      outputs.size());
  c10::SymInt rows = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const Tensor& output = outputs[i];
    TORCH_CHECK_VALUE(
        weight.scalar_type() == at::kFloat && weight.dim() > 0 && weight.device() == weights[0].device(),
        kOp,
        ": weight ",
        i,
        " must be float32 of one or more dimensions on the device of the first one, ",
        weights[0].device(),
        ", got ",
        weight.scalar_type(),
        " of shape ",
        weight.sym_sizes(),
        " on ",
        weight.device());
    TORCH_CHECK_VALUE(
        output.scalar_type() == at::kFloat && output.sym_sizes() == weight.sym_sizes() &&
            output.device() == weight.device(),
        kOp,
        ": output ",
        i,
        " must be float32 of the shape and on the device of its weight, ",
        weight.sym_sizes(),
        " on ",
        weight.device(),
        ", got ",
        output.scalar_type(),
        " of shape ",
        output.sym_sizes(),
        " on ",
        output.device());
    rows += weight.sym_size(0);
  }
  return rows;
}

// Returns true if the rows of both tensors lie one behind the other in memory, with their elements in the same order.
// The sums of 2 bits have an order of elements, that of a contiguous tensor.
bool has_rows(const Tensor& weight, const Tensor& output, int64_t bits) {
  if (weight.is_contiguous() && output.is_contiguous()) {
    return true;
  }
  return bits != 2 && weight.strides() == output.strides() && weight.is_non_overlapping_and_dense() &&
      weight.stride(0) * weight.size(0) == weight.numel();
}

}  // namespace

Tensor fake_quantize_weights_meta(TensorList weights, TensorList outputs, int64_t bits) {
  const auto rows = check_rows(weights, outputs, bits);
  return empty_symint({rows}, weights[0].options());
}

Tensor fake_quantize_weights_cpu(TensorList weights, TensorList outputs, int64_t bits) {
  const auto all_rows = check_rows(weights, outputs, bits);
  const Tensor scales = empty_symint({all_rows}, weights[0].options());
  auto* next_scales = scales.mutable_data_ptr<float>();
  std::vector<cpu::fake_quantize::Rows> rows;
  rows.reserve(weights.size());
  // Tensors that are not as the kernel takes them, and their outputs.
  std::vector<Tensor> copies;
  std::vector<std::pair<Tensor, Tensor>> written;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_memory(kOp, "a weight", weights[i]);
    check_memory(kOp, "an output", outputs[i]);
    TORCH_CHECK_VALUE(
        weights[i].numel() == 0 || !weights[i].is_alias_of(outputs[i]),
        kOp,
        ": output ",
        i,
        " must not share the storage of its weight");
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    // A weight or an output may have a pending negation.
    Tensor weight = weights[i].resolve_neg();
    Tensor output = outputs[i];
    if (weight.numel() == 0) {
      std::fill_n(next_scales, weight.size(0), bits == 2 ? 0x1p-64f : 1);
      next_scales += weight.size(0);
      continue;
    }
    if (output.is_neg() || !has_rows(weight, output, bits)) {
      weight = weight.contiguous();
      output = empty(weight.sizes(), weight.options());
      copies.push_back(weight);
      written.emplace_back(outputs[i], output);
    } else if (!weight.is_same(weights[i])) {
      copies.push_back(weight);
    }
    rows.push_back(
        {.weights = weight.const_data_ptr<float>(),
         .outputs = output.mutable_data_ptr<float>(),
         .scales = next_scales,
         .rows = weight.size(0),
         .columns = weight.numel() / weight.size(0)});
    next_scales += weight.size(0);
  }
  cpu::fake_quantize::fake_quantize(rows, bits);
  for (const auto& [output, values] : written) {
    output.copy_(values);
  }
  for (const Tensor& output : outputs) {
    if (!output.is_inference()) {
      // A graph that has saved an earlier output raises an error in backward.
      output.unsafeGetTensorImpl()->bump_version();
    }
  }
  return scales;
}

}  // namespace lightkit
