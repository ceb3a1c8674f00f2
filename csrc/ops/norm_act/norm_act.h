// The ops of batch normalization with residual, activation function and pool, as in cross_entropy.h.
#pragma once

#include "../../kernels/cpu/norm_act/shape.h"
#include "../common/checks.h"
#include "../common/tensors.h"

#include <optional>
#include <tuple>
#include <vector>

// The activation function, as kernels/cpu/norm_act/activation.h has it. `pool` below is a Pool of shape.h there.
#define LIGHTKIT_ACTIVATION_PARAMETERS int64_t activation, double alpha, double beta

// The tensors and the settings of an op, as parameters and as arguments.
#define LIGHTKIT_NORM_PARAMETERS                                                                           \
  const at::Tensor &input, const std::optional<at::Tensor>&weight, const std::optional<at::Tensor>&bias,   \
      const std::optional<at::Tensor>&running_mean, const std::optional<at::Tensor>&running_var,           \
      const std::optional<at::Tensor>&residual, const std::optional<at::Tensor>&statistics, bool training, \
      double momentum, double eps, LIGHTKIT_ACTIVATION_PARAMETERS, int64_t pool
#define LIGHTKIT_NORM_ARGUMENTS                                                                                     \
  input, weight, bias, running_mean, running_var, residual, statistics, training, momentum, eps, activation, alpha, \
      beta, pool

namespace lightkit {

inline constexpr auto kNormLayout = at::MemoryFormat::ChannelsLast;

// The sizes of the input, which may be symbols; height and width are 1 for an input of two dimensions.
struct NormSizes {
  c10::SymInt images, channels, height, width;
  bool is_image;
  bool relu;
  cpu::norm_act::Pool pool;

  std::vector<c10::SymInt> output() const;
  // The sizes of the tensor that tells which values are live (kernels/cpu/norm_act/passes.h).
  std::vector<c10::SymInt> live() const;
};

// These functions raise for arguments that do not fit.
NormSizes check_norm(LIGHTKIT_NORM_PARAMETERS);

NormSizes check_norm_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& weight,
    const at::Tensor& kept,
    const at::Tensor& live,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual,
    int64_t activation,
    int64_t pool);

// Output, mean and inverse standard deviation [2, channels], and which values are live.
using NormResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The last tensor is [0] unless it is kept for backward.
NormResults allocate_norm_results(const at::Tensor& input, const NormSizes& sizes, bool keep);

// The gradients of input, weight, bias and residual.
using NormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The gradients that are not wanted are [0].
NormGradients allocate_norm_gradients(
    const at::Tensor& input, const NormSizes& sizes, bool input_wanted, bool affine_wanted, bool residual_wanted);

// lightkit::norm_act.
using NormActOp = at::Tensor(LIGHTKIT_NORM_PARAMETERS);
NormActOp norm_act_below_autograd, norm_act_autograd, call_norm_act;

// lightkit::_norm_act_forward.
using NormForwardOp = NormResults(LIGHTKIT_NORM_PARAMETERS, bool keep);
NormForwardOp norm_forward_meta, norm_forward_cpu, norm_forward_negative, call_norm_forward;

// lightkit::_norm_act_backward.
using NormBackwardOp = NormGradients(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& weight,
    const at::Tensor& kept,
    const at::Tensor& live,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual,
    bool training,
    LIGHTKIT_ACTIVATION_PARAMETERS,
    int64_t pool,
    bool input_wanted,
    bool affine_wanted,
    bool residual_wanted);
NormBackwardOp norm_backward_meta, norm_backward_cpu, call_norm_backward;

}  // namespace lightkit
