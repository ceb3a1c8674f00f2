// lightkit::conv2d: the Meta kernels and autograd.

#include "conv2d.h"

#include "../common/autograd_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <memory>

namespace lightkit {

using at::Tensor;

Conv2dResults conv2d_meta(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    LIGHTKIT_CONV2D_PARAMETERS,
    bool statistics) {
  return allocate_conv2d(input, check_conv2d(input, weight, bias, LIGHTKIT_CONV2D_ARGUMENTS), statistics);
}

Conv2dGradients conv2d_backward_meta(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& weight,
    LIGHTKIT_CONV2D_PARAMETERS,
    Conv2dWanted wanted) {
  check_conv2d_backward(grad_output, input, weight, LIGHTKIT_CONV2D_ARGUMENTS);
  return allocate_conv2d_gradients(input, weight, wanted);
}

namespace {

// The node's inputs are input, weight, and the bias if there is one. It saves input and weight.
class Conv2dBackward : public Backward {
 public:
  Conv2dBackward(LIGHTKIT_CONV2D_PARAMETERS, bool has_bias)
      : stride_(stride.vec()),
        padding_(padding.vec()),
        dilation_(dilation.vec()),
        groups_(groups),
        has_bias_(has_bias) {}

  const char* name() const override {
    return "Conv2dBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_output) override {
    std::vector<Tensor> gradients(has_bias_ ? 3 : 2);
    if (!grad_output.defined()) {
      return gradients;
    }
    const Conv2dWanted wanted{is_wanted(0), is_wanted(1), has_bias_ && is_wanted(2)};
    const Tensor input = saved(0);
    const Tensor weight = saved(1);
    if (at::GradMode::is_enabled() || is_batched(grad_output)) {
      return reference_gradients(grad_output, input, weight, wanted);
    }
    auto [of_input, of_weight, of_bias] =
        call_conv2d_backward(grad_output, input, weight, stride_, padding_, dilation_, groups_, wanted);
    const Tensor* const found[] = {&of_input, &of_weight, &of_bias};
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (wanted[i]) {
        gradients[i] = *found[i];
      }
    }
    return gradients;
  }

 private:
  // Returns the gradients in torch's ops: they are differentiable, for backward with create_graph=True, and take a
  // batch of upstream gradients.
  std::vector<Tensor> reference_gradients(
      const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Conv2dWanted& wanted) const {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode grad_mode(true);
    // Aliases cut the graph between the tensors, if one was computed from the other.
    const Tensor x = input.requires_grad() ? input.alias() : input;
    const Tensor w = weight.requires_grad() ? weight.alias() : weight;
    const Tensor output = convolution(x, w, stride_, padding_, dilation_, groups_);
    std::vector<Tensor> inputs;
    if (wanted[0]) {
      inputs.push_back(input);
    }
    if (wanted[1]) {
      inputs.push_back(weight);
    }
    std::vector<Tensor> gradients(has_bias_ ? 3 : 2);
    if (!inputs.empty()) {
      const auto found = differentiate(output, inputs, grad_output, create_graph);
      for (size_t i = 0, j = 0; i < 2; ++i) {
        if (wanted[i]) {
          gradients[i] = found[j++];
        }
      }
    }
    if (wanted[2]) {
      gradients[2] = grad_output.sum(at::IntArrayRef{0, 2, 3});
    }
    return gradients;
  }

  const std::vector<int64_t> stride_;
  const std::vector<int64_t> padding_;
  const std::vector<int64_t> dilation_;
  const int64_t groups_;
  const bool has_bias_;
};

}  // namespace

Conv2dResults conv2d_autograd(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    LIGHTKIT_CONV2D_PARAMETERS,
    bool statistics) {
  std::vector<Tensor> inputs{input, weight};
  if (is_there(bias)) {
    inputs.push_back(*bias);
  }
  Conv2dResults results;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    results = call_conv2d(input, weight, bias, LIGHTKIT_CONV2D_ARGUMENTS, statistics);
  }
  bool needs_gradient = false;
  for (const Tensor& tensor : inputs) {
    needs_gradient = needs_gradient || tensor.requires_grad();
  }
  if (at::GradMode::is_enabled() && needs_gradient) {
    record(
        std::get<0>(results),
        std::make_unique<Conv2dBackward>(LIGHTKIT_CONV2D_ARGUMENTS, is_there(bias)),
        inputs,
        {input, weight});
  }
  return results;
}

}  // namespace lightkit
