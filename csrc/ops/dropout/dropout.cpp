// lightkit::dropout: checks, the Meta kernel and autograd. The op is linear in its input: it is its own backward, with
// the same seed and the same order of elements.

#include "dropout.h"

#include "../common/autograd_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>
#include <numeric>

namespace lightkit {

using at::Tensor;

namespace {

// Returns the dimensions in the order of the input's memory if the input is dense.
std::vector<int64_t> memory_order(const Tensor& input) {
  std::vector<int64_t> order(input.dim());
  std::iota(order.begin(), order.end(), 0);
  if (input.is_contiguous() || !input.is_non_overlapping_and_dense()) {
    return order;
  }
  const auto strides = input.sym_strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

class DropoutBackward : public Backward {
 public:
  DropoutBackward(double p, std::vector<int64_t> order) : p_(p), order_(std::move(order)) {}

  const char* name() const override {
    return "DropoutBackward";
  }

  std::vector<Tensor> apply(const Tensor& grad_output) override {
    return {grad_output.defined() ? call_dropout(grad_output, saved(0), p_, order_) : Tensor()};
  }

 private:
  const double p_;
  const std::vector<int64_t> order_;
};

}  // namespace

std::vector<int64_t> check_dropout(
    const Tensor& input, const Tensor& seed, double p, c10::OptionalArrayRef<int64_t> order) {
  constexpr auto op = "dropout";
  TORCH_CHECK_VALUE(
      at::isFloatingType(input.scalar_type()), op, ": the input must be floating point, got ", input.scalar_type());
  TORCH_CHECK_VALUE(
      seed.scalar_type() == at::kLong && seed.dim() == 0,
      op,
      ": the seed must be one int64, got shape ",
      seed.sym_sizes(),
      " of ",
      seed.scalar_type());
  TORCH_CHECK_VALUE(
      seed.device() == input.device(),
      op,
      ": the seed must be on the device of the input, ",
      input.device(),
      ", got ",
      seed.device());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, op, ": p must be between 0 and 1, got ", p);
  if (!order.has_value()) {
    return memory_order(input);
  }
  std::vector<int64_t> sorted = order->vec();
  std::sort(sorted.begin(), sorted.end());
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(sorted.size()) == input.dim() && is_identity(sorted),
      op,
      ": the order must be a permutation of the ",
      input.dim(),
      " dimensions, got ",
      *order);
  return order->vec();
}

std::vector<int64_t> inverse_order(at::IntArrayRef order) {
  std::vector<int64_t> inverse(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    inverse[order[i]] = static_cast<int64_t>(i);
  }
  return inverse;
}

bool is_identity(at::IntArrayRef order) {
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] != static_cast<int64_t>(i)) {
      return false;
    }
  }
  return true;
}

Tensor dropout_meta(const Tensor& input, const Tensor& seed, double p, c10::OptionalArrayRef<int64_t> given) {
  const auto order = check_dropout(input, seed, p, given);
  return empty_symint(input.permute(order).sym_sizes(), input.options()).permute(inverse_order(order));
}

Tensor dropout_autograd(const Tensor& input, const Tensor& seed, double p, c10::OptionalArrayRef<int64_t> given) {
  if (!at::GradMode::is_enabled() || !input.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_dropout(input, seed, p, given);
  }
  auto order = check_dropout(input, seed, p, given);
  Tensor output;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    output = call_dropout(input, seed, p, order);
  }
  record(output, std::make_unique<DropoutBackward>(p, std::move(order)), {input}, {seed});
  return output;
}

}  // namespace lightkit
