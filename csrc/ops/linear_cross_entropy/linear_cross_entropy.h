// The ops of the fused linear cross-entropy, and what their CPU and CUDA sides share.
#pragma once

#include "../cross_entropy/cross_entropy.h"
#include "../common/tensors.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lightkit {

// The tensors of a call, in the order of the ops' schemas.
#define LIGHTKIT_LINEAR_PARAMETERS                                                             \
  const at::Tensor &hidden, const at::Tensor &linear_weight, const at::Tensor &target,         \
      const std::optional<at::Tensor>&linear_bias, const std::optional<at::Tensor>&weight
#define LIGHTKIT_LINEAR_ARGUMENTS hidden, linear_weight, target, linear_bias, weight

// Which gradients are wanted.
#define LIGHTKIT_WANTED_PARAMETERS bool hidden_wanted, bool weight_wanted, bool bias_wanted
#define LIGHTKIT_WANTED_ARGUMENTS hidden_wanted, weight_wanted, bias_wanted

struct LinearInputs {
  at::Tensor hidden;                      // (N, D)
  at::Tensor linear_weight;               // (C, D)
  at::Tensor target;                      // (N), an integer type
  std::optional<at::Tensor> linear_bias;  // (C)
  std::optional<at::Tensor> weight;       // (C)
};

struct WantedGradients {
  bool hidden;
  bool linear_weight;
  bool linear_bias;

  bool any() const {
    return hidden || linear_weight || linear_bias;
  }
};

// With respect to hidden, linear_weight and linear_bias; those not wanted are of no elements.
using LinearGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Loss, what is known of the rows, and gradients. Of each row (3, N): the largest logit, the logarithm of the sum of
// exp(u - largest), and the logarithm of the probability of the target; 0 for rows that are ignored.
using LinearResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// No gradient: each a tensor of its own, for an op's results must not be one and the same.
inline LinearGradients no_gradients(const at::TensorOptions& options) {
  const auto none = [&] { return empty({0}, options); };
  return {none(), none(), none()};
}

// The ops, as in cross_entropy.h.

// lightkit::linear_cross_entropy: loss and lse.
using LinearCrossEntropyOp = std::tuple<at::Tensor, at::Tensor>(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit);
LinearCrossEntropyOp linear_cross_entropy_below_autograd, linear_cross_entropy_autograd;

// lightkit::_linear_cross_entropy_forward.
using LinearForwardOp = LinearResults(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS);
LinearForwardOp linear_forward_meta, linear_forward_cpu, linear_forward_cuda, call_linear_forward;

// lightkit::_linear_cross_entropy_backward.
using LinearBackwardOp = LinearGradients(
    const at::Tensor& grad_loss,
    const at::Tensor& rows_known,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS);
LinearBackwardOp linear_backward_meta, linear_backward_cpu, linear_backward_cuda, call_linear_backward;

// Raises for arguments that do not fit, in words that name them.
void check_linear_arguments(const LinearInputs& inputs, const CrossEntropyOptions& options, int64_t memory_limit);

// The same, and what the kernels want besides: sizes above 0, and a bias where its gradient is wanted.
void check_kernel_arguments(
    const LinearInputs& inputs, const CrossEntropyOptions& options, int64_t memory_limit, const WantedGradients& wanted);

// Raises where a tensor reaches beyond its storage.
void check_memory(const LinearInputs& inputs);

// Raises for what the backward pass gets besides.
void check_backward_arguments(
    const at::Tensor& grad_loss,
    const at::Tensor& rows_known,
    const LinearInputs& inputs,
    const CrossEntropyOptions& options);

}  // namespace lightkit
