#include "nll_loss.h"

#include "../common/autograd_node.h"
#include "../common/tensors.h"
#include "cross_entropy_checks.h"

#include <memory>

namespace lightkit {

using at::Tensor;

namespace {

// The inputs of the node: the loss as a function of the logits, and the log-probabilities.
enum NodeInput : size_t { kLoss, kLogProbabilities };

class NllLossBackward : public Backward {
 public:
  NllLossBackward(const Tensor& log_probabilities, int64_t reduction, int64_t ignore_index)
      : sizes_(log_probabilities.sizes().vec()),
        options_(log_probabilities.options()),
        reduction_(static_cast<Reduction>(reduction)),
        ignore_index_(ignore_index) {}

  const char* name() const override {
    return "NllLossBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_loss) override {
    if (!grad_loss.defined() || !is_observed(kLogProbabilities)) {
      return {grad_loss, Tensor()};
    }
    return {Tensor(), gradient_of_log_probabilities(grad_loss)};
  }

 private:
  // Returns the gradient with respect to the log-probabilities, in differentiable ops.
  Tensor gradient_of_log_probabilities(const Tensor& grad_loss) const {
    const Tensor target = saved(0), weight = saved(1);
    const int64_t dim = sizes_.size() > 1 ? 1 : 0;
    const Tensor valid = target.ne(ignore_index_);
    const Tensor index = target.where(valid, 0);
    Tensor factor = valid.to(options_.dtype().toScalarType());
    if (weight.defined()) {
      factor = factor * weight.index_select(0, index.flatten()).view(index.sizes());
    }
    if (reduction_ == Reduction::Mean) {
      factor = factor / factor.sum();
    }
    const Tensor values = (factor * grad_loss).neg();
    return zeros(sizes_, options_).scatter(dim, index.unsqueeze(dim), values.unsqueeze(dim));
  }

  const std::vector<int64_t> sizes_;
  const at::TensorOptions options_;
  const Reduction reduction_;
  const int64_t ignore_index_;
};

}  // namespace

Tensor nll_loss_of_log_softmax(
    const Tensor& log_probabilities,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index) {
  const Tensor at_logits = in_place_of_input(log_probabilities);
  const auto loss = std::get<0>(call_cross_entropy(
      at_logits,
      target,
      weight,
      reduction,
      ignore_index,
      /*label_smoothing=*/0,
      /*z_loss=*/0,
      /*softcap=*/0,
      /*dtype=*/std::nullopt,
      /*return_lse=*/false,
      /*inplace=*/false));
  const Tensor result = loss.variable_data();
  record(
      result,
      std::make_unique<NllLossBackward>(log_probabilities, reduction, ignore_index),
      {loss, log_probabilities},
      {target, weight.value_or(Tensor())});
  return result;
}

}  // namespace lightkit
