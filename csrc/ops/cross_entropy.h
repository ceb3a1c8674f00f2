// What the CPU and the CUDA side of cross-entropy share: the checked arguments of one call, as rows of logits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace lightkit {

// torch's numbering (at::Reduction).
enum class Reduction : int64_t { None = 0, Mean = 1, Sum = 2 };

// The arguments of one call after all checks, laid out for a kernel.
struct CrossEntropyProblem {
  at::Tensor logits;    // (rows, classes), contiguous
  at::Tensor target;    // (rows) int64, contiguous
  at::Tensor weight;    // (classes) in the accumulation dtype, or undefined
  at::Tensor smooth;    // (classes): label_smoothing / classes * weight, or undefined
  double smooth_sum;    // NaN on devices where reading it would have to wait: there the kernel sums
  int64_t rows;
  int64_t classes;
};

// Checks the arguments as torch.nn.functional.cross_entropy does and lays them out as rows. A (N, C, d1, ...)
// input becomes N d1 ... rows, which copies.
CrossEntropyProblem make_problem(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    int64_t reduction,
    double label_smoothing);

// A (rows, classes) gradient as one of the shape of `logits`; the inverse of what make_problem did.
at::Tensor unflatten_rows(const at::Tensor& rows, const at::Tensor& logits);

// The loss and its gradient with respect to the logits ((0) where it was not asked for).
using LossAndGradient = std::tuple<at::Tensor, at::Tensor>;

}  // namespace lightkit
