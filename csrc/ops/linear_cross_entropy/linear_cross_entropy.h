// The ops of the fused linear cross-entropy, and the types that the CPU and CUDA files share.
#pragma once

#include "../common/tensors.h"
#include "../cross_entropy/cross_entropy.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lightkit {

// The tensors of a call, in the order of the schemas.
#define LIGHTKIT_LINEAR_PARAMETERS                                                     \
  const at::Tensor &hidden, const at::Tensor &linear_weight, const at::Tensor &target, \
      const std::optional<at::Tensor>&linear_bias, const std::optional<at::Tensor>&weight
#define LIGHTKIT_LINEAR_ARGUMENTS hidden, linear_weight, target, linear_bias, weight

// The wanted gradients, in the order of the schemas.
#define LIGHTKIT_WANTED_PARAMETERS bool hidden_wanted, bool weight_wanted, bool bias_wanted
#define LIGHTKIT_WANTED_ARGUMENTS hidden_wanted, weight_wanted, bias_wanted

struct LinearInputs {
  at::Tensor hidden;                      // [N, D]
  at::Tensor linear_weight;               // [C, D]
  at::Tensor target;                      // [N], an integer dtype
  std::optional<at::Tensor> linear_bias;  // [C], or nullopt
  std::optional<at::Tensor> weight;       // [C], or nullopt for ones
};

struct WantedGradients {
  bool hidden;
  bool linear_weight;
  bool linear_bias;

  bool any() const {
    return hidden || linear_weight || linear_bias;
  }
};

// The gradients of hidden, linear_weight and linear_bias, [0] for those that are not wanted.
using LinearGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Loss, row statistics [3, N], and gradients. The statistics of a row are the largest logit, log sum exp(u - largest),
// and the log-probability of the target; they are 0 for ignored rows.
using LinearResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Returns three empty gradients. Each is its own tensor: an op must not return the same tensor twice.
inline LinearGradients no_gradients(const at::TensorOptions& options) {
  const auto none = [&] { return empty({0}, options); };
  return {none(), none(), none()};
}

// The ops, as in cross_entropy.h.

// lightkit::linear_cross_entropy returns loss and lse.
using LinearCrossEntropyOp =
    std::tuple<at::Tensor, at::Tensor>(LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit);
LinearCrossEntropyOp linear_cross_entropy_below_autograd, linear_cross_entropy_autograd;

// lightkit::_linear_cross_entropy_forward.
using LinearForwardOp = LinearResults(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS);
LinearForwardOp linear_forward_meta, linear_forward_cpu, linear_forward_cuda, call_linear_forward;

// lightkit::_linear_cross_entropy_backward.
using LinearBackwardOp = LinearGradients(
    const at::Tensor& grad_loss,
    const at::Tensor& row_statistics,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS);
LinearBackwardOp linear_backward_meta, linear_backward_cpu, linear_backward_cuda, call_linear_backward;

// Raises for arguments that do not fit; the messages name the argument.
void check_linear_arguments(const LinearInputs& inputs, const CrossEntropyOptions& options, int64_t memory_limit);

// Raises, too, for sizes of 0, and for a wanted gradient of a bias that is not given.
void check_kernel_arguments(
    const LinearInputs& inputs,
    const CrossEntropyOptions& options,
    int64_t memory_limit,
    const WantedGradients& wanted);

// Raises a ValueError for a tensor that reaches beyond its storage.
void check_memory(const LinearInputs& inputs);

// Raises for arguments of backward that do not fit.
void check_backward_arguments(
    const at::Tensor& grad_loss,
    const at::Tensor& row_statistics,
    const LinearInputs& inputs,
    const CrossEntropyOptions& options);

}  // namespace lightkit
