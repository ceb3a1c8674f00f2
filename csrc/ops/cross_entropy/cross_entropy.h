// The ops of cross-entropy, and the options and checked arguments of a call, which the CPU and CUDA files share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace lightkit {

// As at::Reduction.
enum class Reduction : int64_t { None = 0, Mean = 1, Sum = 2 };

// The options of the loss, in the order of the schemas.
#define LIGHTKIT_OPTION_PARAMETERS                                                                \
  int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap, \
      std::optional<at::ScalarType> dtype
#define LIGHTKIT_OPTION_ARGUMENTS reduction, ignore_index, label_smoothing, z_loss, softcap, dtype

struct CrossEntropyOptions {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;                       // 0 for none
  std::optional<at::ScalarType> dtype;  // of the loss; by default that of the logits
};

inline CrossEntropyOptions make_options(LIGHTKIT_OPTION_PARAMETERS) {
  return {static_cast<Reduction>(reduction), ignore_index, label_smoothing, z_loss, softcap, dtype};
}

// The checked arguments of one call, laid out for a kernel.
struct CrossEntropyProblem {
  at::Tensor logits;         // [rows / inner, classes, inner], contiguous
  at::Tensor target;         // [rows] int64, or undefined
  at::Tensor probabilities;  // as `logits`, or undefined
  at::Tensor weight;         // [classes] in the accumulation type, or undefined
  at::Tensor smooth;         // [classes]: label_smoothing / classes * weight, on a CPU; or undefined
  int64_t rows;
  int64_t classes;
  int64_t inner;  // 1 if the classes are the last dimension in memory
};

// Returns double for double, else float.
at::ScalarType accumulation_type(at::ScalarType type);

// Raises a ValueError if the dtype of the loss is not floating point.
void check_loss_dtype(const char* op, const CrossEntropyOptions& options);

// Returns the shape of the unreduced loss: that of the logits without the classes.
std::vector<int64_t> loss_sizes(const at::Tensor& logits);

// Loss, lse of each row, and the gradient with respect to the logits ([0] if it was not requested).
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The functions of a device.
struct CrossEntropyDevice {
  // Returns loss and lse. Writes the gradient to `gradient`, laid out as `problem.logits`, unless that is undefined.
  std::tuple<at::Tensor, at::Tensor> (*run)(
      const CrossEntropyProblem& problem,
      const at::Tensor& logits,
      const CrossEntropyOptions& options,
      const at::Tensor& gradient,
      bool with_lse);
  // Allocates a gradient.
  at::Tensor (*empty_like)(const at::Tensor& like);
  int64_t max_strided_classes;  // of logits whose classes are not the last dimension
};

// The ops. Each has a signature, a function for every dispatch key that dispatch.cpp registers, and a function call_...
// that calls it through torch's dispatcher.

// lightkit::cross_entropy returns loss and lse.
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

// lightkit::_cross_entropy_forward_ replaces the contiguous logits by their gradient.
using CrossEntropyInplaceOp = std::tuple<at::Tensor, at::Tensor>(
    at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse);
CrossEntropyInplaceOp cross_entropy_inplace_cpu, cross_entropy_inplace_cuda, cross_entropy_inplace_negative,
    call_cross_entropy_inplace;

// lightkit::_apply_upstream_ multiplies gradient by upstream, and touches no memory if upstream is 1.
using ApplyUpstreamOp = at::Tensor&(at::Tensor& gradient, const at::Tensor& upstream);
ApplyUpstreamOp apply_upstream_cpu, apply_upstream_cuda, call_apply_upstream;

// Runs lightkit::_cross_entropy_forward on a device.
Results run_forward(
    const CrossEntropyDevice& device,
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options,
    bool with_gradient,
    bool with_lse);

// Runs lightkit::_cross_entropy_forward_ on a device.
std::tuple<at::Tensor, at::Tensor> run_forward_inplace(
    const CrossEntropyDevice& device,
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options,
    bool with_lse);

}  // namespace lightkit
