// The ops of cross-entropy, and what their CPU and CUDA sides share: the options of a call, and its checked arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace lightkit {

// torch's numbering (at::Reduction).
enum class Reduction : int64_t { None = 0, Mean = 1, Sum = 2 };

// The arguments that describe the loss, in the order of the ops' schemas.
#define LIGHTKIT_OPTION_PARAMETERS                                                               \
  int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap, \
      std::optional<at::ScalarType> dtype
#define LIGHTKIT_OPTION_ARGUMENTS reduction, ignore_index, label_smoothing, z_loss, softcap, dtype

struct CrossEntropyOptions {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;                     // 0: none
  std::optional<at::ScalarType> dtype;  // of the loss; that of the logits if not given
};

inline CrossEntropyOptions make_options(LIGHTKIT_OPTION_PARAMETERS) {
  return {static_cast<Reduction>(reduction), ignore_index, label_smoothing, z_loss, softcap, dtype};
}

// The arguments of one call after all checks, laid out for a kernel.
struct CrossEntropyProblem {
  at::Tensor logits;         // contiguous: (rows / inner, classes, inner)
  at::Tensor target;         // (rows) int64, or undefined
  at::Tensor probabilities;  // laid out as the logits and of their dtype, or undefined
  at::Tensor weight;         // (classes) in the accumulation dtype, or undefined
  at::Tensor smooth;         // (classes): label_smoothing / classes * weight, or undefined; on a CPU
  int64_t rows;
  int64_t classes;
  int64_t inner;             // 1 where the classes are the last dimension in memory
};

// float, or double for double.
at::ScalarType accumulation_type(at::ScalarType type);

// Raises a ValueError for a loss that is to be of another dtype than floating point.
void check_loss_dtype(const char* op, const CrossEntropyOptions& options);

// The shape of the unreduced loss: that of the logits without the classes.
std::vector<int64_t> loss_sizes(const at::Tensor& logits);

// Loss, logsumexp of each row, and the gradient with respect to the logits ((0) where it was not asked for).
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// What a device brings: its kernel, which returns loss and lse and writes the gradient into a tensor laid out
// as `problem.logits` unless that is undefined; where the gradient's memory comes from; and how many classes
// it takes where they are not the last dimension.
struct CrossEntropyDevice {
  std::tuple<at::Tensor, at::Tensor> (*run)(
      const CrossEntropyProblem& problem,
      const at::Tensor& logits,
      const CrossEntropyOptions& options,
      const at::Tensor& gradient,
      bool with_lse);
  at::Tensor (*empty_like)(const at::Tensor& like);
  int64_t max_strided_classes;
};

// The ops. Each has a signature, a function for every dispatch key that dispatch.cpp registers it with, and one that calls
// it through torch's dispatcher.

// lightkit::cross_entropy: loss and lse.
using CrossEntropyOp = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool return_lse,
    bool inplace);
CrossEntropyOp cross_entropy_below_autograd, cross_entropy_autograd, call_cross_entropy;

// lightkit::_cross_entropy_forward.
using CrossEntropyForwardOp = Results(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse);
CrossEntropyForwardOp cross_entropy_forward_meta, cross_entropy_forward_cpu, cross_entropy_forward_cuda,
    call_cross_entropy_forward;

// lightkit::_cross_entropy_forward_: the gradient takes the place of the contiguous logits.
using CrossEntropyInplaceOp = std::tuple<at::Tensor, at::Tensor>(
    at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse);
CrossEntropyInplaceOp cross_entropy_inplace_cpu, cross_entropy_inplace_cuda, cross_entropy_inplace_negative,
    call_cross_entropy_inplace;

// lightkit::_apply_upstream_: gradient *= upstream, without touching memory where upstream is 1.
using ApplyUpstreamOp = at::Tensor&(at::Tensor& gradient, const at::Tensor& upstream);
ApplyUpstreamOp apply_upstream_cpu, apply_upstream_cuda, call_apply_upstream;

// lightkit::_cross_entropy_forward on a device: checks, layout, kernel.
Results run_forward(
    const CrossEntropyDevice& device,
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options,
    bool with_gradient,
    bool with_lse);

// lightkit::_cross_entropy_forward_: the gradient takes the place of the contiguous logits.
std::tuple<at::Tensor, at::Tensor> run_forward_inplace(
    const CrossEntropyDevice& device,
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options,
    bool with_lse);

}  // namespace lightkit
