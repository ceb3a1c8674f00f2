// What the CPU and the CUDA side of cross-entropy share: the options of a call, and its checked arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace lightkit {

// torch's numbering (at::Reduction).
enum class Reduction : int64_t { None = 0, Mean = 1, Sum = 2 };

struct CrossEntropyOptions {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;                     // 0: none
  std::optional<at::ScalarType> dtype;  // of the loss; that of the logits if not given
};

// The arguments of one call after all checks, laid out for a kernel.
struct CrossEntropyProblem {
  at::Tensor logits;         // contiguous: (rows / inner, classes, inner)
  at::Tensor target;         // (rows) int64, or undefined
  at::Tensor probabilities;  // laid out as the logits and of their dtype, or undefined
  at::Tensor weight;         // (classes) in the accumulation dtype, or undefined
  at::Tensor smooth;         // (classes): label_smoothing / classes * weight, or undefined
  int64_t rows;
  int64_t classes;
  int64_t inner;             // 1 where the classes are the last dimension in memory
};

// float, or double for double.
at::ScalarType accumulation_type(at::ScalarType type);

// Checks the arguments as torch.nn.functional.cross_entropy does and lays them out. A (N, C, d1, ...) input is
// taken as it lies where it is contiguous and has at most `max_strided_classes` classes, or where its classes
// are last in memory; else it is copied.
CrossEntropyProblem make_problem(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options,
    int64_t max_strided_classes);

// A gradient in the layout of `problem.logits`, as one of the shape and strides that the op promises.
at::Tensor as_logits_shaped(const at::Tensor& gradient, const CrossEntropyProblem& problem, const at::Tensor& logits);

// The shape of the unreduced loss: that of the logits without the classes.
std::vector<int64_t> loss_sizes(const at::Tensor& logits);

// Loss, logsumexp of each row, and the gradient with respect to the logits ((0) where it was not asked for).
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

}  // namespace lightkit
