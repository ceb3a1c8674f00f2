// The ops at torch's dispatcher: schemas, the functions of each dispatch key, and calls through the dispatcher. Only
// this file includes the dispatcher's headers, which take 4 s to compile.

#include "../conv2d/conv2d.h"
#include "../cross_entropy/cross_entropy.h"
#include "../dropout/dropout.h"
#include "../fake_quantize/fake_quantize.h"
#include "../int8_chain/int8_chain.h"
#include "../layer_chain/layer_chain.h"
#include "../linear_cross_entropy/linear_cross_entropy.h"
#include "../norm_act/norm_act.h"

#include <torch/library.h>

namespace lightkit {
namespace {

template <typename Op>
c10::TypedOperatorHandle<Op> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

// The dispatcher finds tensors in a list of optional tensors only if that is a c10::List.
using OptionalTensorList = c10::List<std::optional<at::Tensor>>;

OptionalTensorList as_list(OptionalTensors tensors) {
  OptionalTensorList list;
  list.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    list.push_back(tensor);
  }
  return list;
}

std::vector<std::optional<at::Tensor>> as_vector(const OptionalTensorList& list) {
  return {list.begin(), list.end()};
}

template <LayerChainOp op>
at::Tensor layer_chain(
    const at::Tensor& input,
    at::TensorList weights,
    const OptionalTensorList& biases,
    at::IntArrayRef settings,
    at::ArrayRef<double> scales) {
  return op(input, weights, as_vector(biases), settings, scales);
}

template <ChainForwardOp op>
ChainResults chain_forward(
    const at::Tensor& input,
    at::TensorList weights,
    const OptionalTensorList& biases,
    at::IntArrayRef settings,
    bool keep,
    at::ArrayRef<double> scales) {
  return op(input, weights, as_vector(biases), settings, keep, scales);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> call_cross_entropy(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool return_lse,
    bool inplace) {
  static const auto op = find_op<CrossEntropyOp>("lightkit::cross_entropy");
  return op.call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, return_lse, inplace);
}

Results call_cross_entropy_forward(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse) {
  static const auto op = find_op<CrossEntropyForwardOp>("lightkit::_cross_entropy_forward");
  return op.call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_gradient, with_lse);
}

std::tuple<at::Tensor, at::Tensor> call_cross_entropy_inplace(
    at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse) {
  static const auto op = find_op<CrossEntropyInplaceOp>("lightkit::_cross_entropy_forward_");
  return op.call(logits, target, weight, LIGHTKIT_OPTION_ARGUMENTS, with_lse);
}

at::Tensor& call_apply_upstream(at::Tensor& gradient, const at::Tensor& upstream) {
  static const auto op = find_op<ApplyUpstreamOp>("lightkit::_apply_upstream_");
  return op.call(gradient, upstream);
}

LinearResults call_linear_forward(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS) {
  static const auto op = find_op<LinearForwardOp>("lightkit::_linear_cross_entropy_forward");
  return op.call(LIGHTKIT_LINEAR_ARGUMENTS, LIGHTKIT_OPTION_ARGUMENTS, memory_limit, LIGHTKIT_WANTED_ARGUMENTS);
}

LinearGradients call_linear_backward(
    const at::Tensor& grad_loss,
    const at::Tensor& row_statistics,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS) {
  static const auto op = find_op<LinearBackwardOp>("lightkit::_linear_cross_entropy_backward");
  return op.call(
      grad_loss,
      row_statistics,
      LIGHTKIT_LINEAR_ARGUMENTS,
      LIGHTKIT_OPTION_ARGUMENTS,
      memory_limit,
      LIGHTKIT_WANTED_ARGUMENTS);
}

at::Tensor call_layer_chain(
    const at::Tensor& input,
    at::TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef settings,
    at::ArrayRef<double> scales) {
  static const auto op = find_op<decltype(layer_chain<layer_chain_autograd>)>("lightkit::layer_chain");
  return op.call(input, weights, as_list(biases), settings, scales);
}

ChainResults call_chain_forward(
    const at::Tensor& input,
    at::TensorList weights,
    OptionalTensors biases,
    at::IntArrayRef settings,
    bool keep,
    at::ArrayRef<double> scales) {
  static const auto op = find_op<decltype(chain_forward<chain_forward_cpu>)>("lightkit::_layer_chain_forward");
  return op.call(input, weights, as_list(biases), settings, keep, scales);
}

std::vector<at::Tensor> call_chain_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    at::TensorList weights,
    const at::Tensor& activations,
    const at::Tensor& argmax,
    at::IntArrayRef settings,
    at::IntArrayRef wanted) {
  static const auto op = find_op<ChainBackwardOp>("lightkit::_layer_chain_backward");
  return op.call(grad_output, input, weights, activations, argmax, settings, wanted);
}

at::Tensor call_dropout(
    const at::Tensor& input, const at::Tensor& seed, double p, c10::OptionalArrayRef<int64_t> order) {
  static const auto op = find_op<DropoutOp>("lightkit::dropout");
  return op.call(input, seed, p, order);
}

Conv2dResults call_conv2d(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    LIGHTKIT_CONV2D_PARAMETERS,
    bool statistics) {
  static const auto op = find_op<Conv2dOp>("lightkit::conv2d");
  return op.call(input, weight, bias, LIGHTKIT_CONV2D_ARGUMENTS, statistics);
}

Conv2dGradients call_conv2d_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& weight,
    LIGHTKIT_CONV2D_PARAMETERS,
    Conv2dWanted wanted) {
  static const auto op = find_op<Conv2dBackwardOp>("lightkit::_conv2d_backward");
  return op.call(grad_output, input, weight, LIGHTKIT_CONV2D_ARGUMENTS, wanted);
}

NormResults call_norm_forward(LIGHTKIT_NORM_PARAMETERS, bool keep) {
  static const auto op = find_op<NormForwardOp>("lightkit::_norm_act_forward");
  return op.call(LIGHTKIT_NORM_ARGUMENTS, keep);
}

NormGradients call_norm_backward(
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
    bool residual_wanted) {
  static const auto op = find_op<NormBackwardOp>("lightkit::_norm_act_backward");
  return op.call(
      grad_output,
      input,
      weight,
      kept,
      live,
      bias,
      residual,
      training,
      activation,
      alpha,
      beta,
      pool,
      input_wanted,
      affine_wanted,
      residual_wanted);
}

#define LIGHTKIT_OPTION_SCHEMA \
  "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, ScalarType? dtype, "
#define LIGHTKIT_LINEAR_SCHEMA \
  "Tensor hidden, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
#define LIGHTKIT_WANTED_SCHEMA "bool hidden_wanted, bool weight_wanted, bool bias_wanted"
#define LIGHTKIT_ACTIVATION_SCHEMA "int activation, float alpha, float beta"
#define LIGHTKIT_NORM_SCHEMA                                                                                    \
  "Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "             \
  "Tensor? residual, Tensor? statistics, bool training, float momentum, float eps, " LIGHTKIT_ACTIVATION_SCHEMA \
  ", int pool"

TORCH_LIBRARY_FRAGMENT(lightkit, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, ScalarType? dtype=None, "
      "bool return_lse=False, bool inplace=False) -> (Tensor loss, Tensor lse)");
  m.def(
      "_cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, " LIGHTKIT_OPTION_SCHEMA
      "bool with_gradient, bool with_lse) -> (Tensor loss, Tensor lse, Tensor gradient)");
  m.def(
      "_cross_entropy_forward_(Tensor(a!) logits, Tensor target, Tensor? weight, " LIGHTKIT_OPTION_SCHEMA
      "bool with_lse) -> (Tensor loss, Tensor lse)");
  m.def("_apply_upstream_(Tensor(a!) gradient, Tensor upstream) -> Tensor(a!)");

  m.def(
      "linear_cross_entropy(" LIGHTKIT_LINEAR_SCHEMA LIGHTKIT_OPTION_SCHEMA
      "int memory_limit) -> (Tensor loss, Tensor lse)");
  m.def(
      "_linear_cross_entropy_forward(" LIGHTKIT_LINEAR_SCHEMA LIGHTKIT_OPTION_SCHEMA
      "int memory_limit, " LIGHTKIT_WANTED_SCHEMA
      ") -> (Tensor loss, Tensor row_statistics, "
      "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)");
  m.def(
      "_linear_cross_entropy_backward(Tensor grad_loss, "
      "Tensor row_statistics, " LIGHTKIT_LINEAR_SCHEMA LIGHTKIT_OPTION_SCHEMA
      "int memory_limit, " LIGHTKIT_WANTED_SCHEMA
      ") -> (Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)");

  m.def("layer_chain(Tensor input, Tensor[] weights, Tensor?[] biases, int[] settings, float[] scales=[]) -> Tensor");
  m.def(
      "_layer_chain_forward(Tensor input, Tensor[] weights, Tensor?[] biases, int[] settings, bool keep, "
      "float[] scales=[]) -> (Tensor output, Tensor activations, Tensor argmax)");
  m.def(
      "_layer_chain_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor activations, Tensor argmax, "
      "int[] settings, int[] wanted) -> Tensor[]");
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "bool statistics) -> (Tensor output, Tensor statistics)");
  m.def(
      "_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  m.def("conv_relu_pool(Tensor input, Tensor weight, Tensor? bias, int[2] padding, bool pool) -> Tensor");

  m.def("norm_act(" LIGHTKIT_NORM_SCHEMA ") -> Tensor");
  m.def("_norm_act_forward(" LIGHTKIT_NORM_SCHEMA ", bool keep) -> (Tensor output, Tensor kept, Tensor live)");
  m.def(
      "_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor kept, Tensor live, Tensor? bias, "
      "Tensor? residual, bool training, " LIGHTKIT_ACTIVATION_SCHEMA
      ", int pool, bool input_wanted, bool affine_wanted, bool residual_wanted) "
      "-> (Tensor input_gradient, Tensor weight_gradient, Tensor bias_gradient, Tensor residual_gradient)");
  m.def("dropout(Tensor input, Tensor seed, float p, int[]? order=None) -> Tensor");

  m.def("int8_chain(Tensor input, Tensor packed, int[] plan, float input_scale) -> Tensor");
  m.def("int8_chain_pack(Tensor[] weights, Tensor[] biases, Tensor[] multipliers, int[] plan) -> Tensor");
  m.def("_fake_quantize_weights_(Tensor[] weights, Tensor(a!)[] outputs, int bits) -> Tensor scales");
}

TORCH_LIBRARY_IMPL(lightkit, CPU, m) {
  m.impl("_cross_entropy_forward", cross_entropy_forward_cpu);
  m.impl("_cross_entropy_forward_", cross_entropy_inplace_cpu);
  m.impl("_apply_upstream_", apply_upstream_cpu);
  m.impl("_linear_cross_entropy_forward", linear_forward_cpu);
  m.impl("_linear_cross_entropy_backward", linear_backward_cpu);
  m.impl("_layer_chain_forward", chain_forward<chain_forward_cpu>);
  m.impl("_layer_chain_backward", chain_backward_cpu);
  m.impl("_norm_act_forward", norm_forward_cpu);
  m.impl("_norm_act_backward", norm_backward_cpu);
  m.impl("dropout", dropout_cpu);
  m.impl("conv2d", conv2d_cpu);
  m.impl("_conv2d_backward", conv2d_backward_cpu);
  m.impl("int8_chain", int8_chain_cpu);
  m.impl("int8_chain_pack", int8_chain_pack_cpu);
  m.impl("_fake_quantize_weights_", fake_quantize_weights_cpu);
}

#ifdef LIGHTKIT_CUDA
TORCH_LIBRARY_IMPL(lightkit, CUDA, m) {
  m.impl("_cross_entropy_forward", cross_entropy_forward_cuda);
  m.impl("_cross_entropy_forward_", cross_entropy_inplace_cuda);
  m.impl("_apply_upstream_", apply_upstream_cuda);
  m.impl("_linear_cross_entropy_forward", linear_forward_cuda);
  m.impl("_linear_cross_entropy_backward", linear_backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(lightkit, Meta, m) {
  m.impl("_cross_entropy_forward", cross_entropy_forward_meta);
  m.impl("_linear_cross_entropy_forward", linear_forward_meta);
  m.impl("_linear_cross_entropy_backward", linear_backward_meta);
  m.impl("_layer_chain_forward", chain_forward<chain_forward_meta>);
  m.impl("_layer_chain_backward", chain_backward_meta);
  m.impl("_norm_act_forward", norm_forward_meta);
  m.impl("_norm_act_backward", norm_backward_meta);
  m.impl("dropout", dropout_meta);
  m.impl("conv2d", conv2d_meta);
  m.impl("_conv2d_backward", conv2d_backward_meta);
  m.impl("int8_chain", int8_chain_meta);
  m.impl("int8_chain_pack", int8_chain_pack_meta);
  m.impl("_fake_quantize_weights_", fake_quantize_weights_meta);
}

TORCH_LIBRARY_IMPL(lightkit, Negative, m) {
  m.impl("_cross_entropy_forward_", cross_entropy_inplace_negative);
  m.impl("_norm_act_forward", norm_forward_negative);
  // It calls the op above.
  m.impl("norm_act", torch::CppFunction::makeFallthrough());
  // torch's fallback takes no lists that are written.
  m.impl("_fake_quantize_weights_", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(lightkit, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy_below_autograd);
  m.impl("linear_cross_entropy", linear_cross_entropy_below_autograd);
  m.impl("layer_chain", layer_chain<layer_chain_below_autograd>);
  m.impl("norm_act", norm_act_below_autograd);
}

TORCH_LIBRARY_IMPL(lightkit, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
  m.impl("linear_cross_entropy", linear_cross_entropy_autograd);
  m.impl("layer_chain", layer_chain<layer_chain_autograd>);
  m.impl("norm_act", norm_act_autograd);
  m.impl("dropout", dropout_autograd);
  m.impl("conv2d", conv2d_autograd);
  // They round: their results have no gradients.
  for (const char* name : {"int8_chain", "int8_chain_pack", "_fake_quantize_weights_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(lightkit, CompositeImplicitAutograd, m) {
  m.impl("conv_relu_pool", conv_relu_pool);
}

}  // namespace lightkit
