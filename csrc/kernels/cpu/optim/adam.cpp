#include "../../optim/adam.h"

#include "step.h"
#include "tuning.h"

#include <cmath>

namespace lightkit::cpu::optim {
namespace {

using at::vec::Vectorized;

// The update of kernels/optim/adam.h for elements of the accumulation type.
template <typename acc_t>
class AdamRule {
 public:
  using Vec = Vectorized<acc_t>;

  explicit AdamRule(const AdamTensor& tensor)
      : factor_(signed_factor<acc_t>(*tensor.options)),
        shrinks_(tensor.options->decoupled && tensor.options->weight_decay != 0),
        penalizes_(!tensor.options->decoupled && tensor.options->weight_decay != 0),
        shrink_(static_cast<acc_t>(1 - tensor.options->lr * tensor.options->weight_decay)),
        penalty_(static_cast<acc_t>(tensor.options->weight_decay)),
        intake1_(static_cast<acc_t>(1 - tensor.options->beta1)),
        beta2_(static_cast<acc_t>(tensor.options->beta2)),
        intake2_(static_cast<acc_t>(1 - tensor.options->beta2)),
        eps_(static_cast<acc_t>(tensor.options->eps)) {
    const auto t = static_cast<double>(tensor.count);
    negative_step_ = Vec(static_cast<acc_t>(-tensor.options->lr / (1 - std::pow(tensor.options->beta1, t))));
    inverse_correction_ = Vec(static_cast<acc_t>(1 / std::sqrt(1 - std::pow(tensor.options->beta2, t))));
  }

  template <bool amsgrad>
  void update(
      int64_t count,
      acc_t* parameter,       // [count]
      const acc_t* gradient,  // [count]
      acc_t* m,               // [count]
      acc_t* v,               // [count]
      acc_t* largest          // [count], or null without amsgrad
  ) const {
    const auto step = [&](int64_t i, int n) {
      Vec p = Vec::loadu(parameter + i, n);
      Vec g = Vec::loadu(gradient + i, n) * factor_;
      // A term that is off is left out, not multiplied by 0 or 1, which would make NaN of an infinite parameter.
      if (penalizes_) {
        g = at::vec::fmadd(penalty_, p, g);
      } else if (shrinks_) {
        p = p * shrink_;
      }
      const Vec old = Vec::loadu(m + i, n);
      const Vec mean = at::vec::fmadd(intake1_, g - old, old);
      const Vec square = at::vec::fmadd(intake2_ * g, g, beta2_ * Vec::loadu(v + i, n));
      mean.store(m + i, n);
      square.store(v + i, n);
      Vec scale = square;
      if constexpr (amsgrad) {
        scale = at::vec::maximum(Vec::loadu(largest + i, n), square);
        scale.store(largest + i, n);
      }
      const Vec denominator = at::vec::fmadd(scale.sqrt(), inverse_correction_, eps_);
      at::vec::fmadd(negative_step_, mean / denominator, p).store(parameter + i, n);
    };
    int64_t i = 0;
    for (; i + Vec::size() <= count; i += Vec::size()) {
      step(i, Vec::size());
    }
    if (i < count) {
      step(i, static_cast<int>(count - i));
    }
  }

 private:
  Vec factor_;
  bool shrinks_;
  bool penalizes_;
  Vec shrink_, penalty_, intake1_, beta2_, intake2_, eps_, negative_step_, inverse_correction_;
};

template <typename scalar_t>
void update_adam(const AdamTensor& tensor, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  auto* parameter = static_cast<scalar_t*>(tensor.parameter);
  const auto* gradient = static_cast<const scalar_t*>(tensor.gradient);
  const auto [m, v, largest] = tensor.states;
  const AdamRule<acc_t> rule(tensor);
  alignas(64) acc_t values[kAdamBlock], gradients[kAdamBlock];
  for (int64_t start = begin; start < end; start += kAdamBlock) {
    const int64_t count = std::min(kAdamBlock, end - start);
    acc_t* p = values;
    if constexpr (!is_half<scalar_t>) {
      p = parameter + start;
    } else if (tensor.master != nullptr) {
      refresh_master<scalar_t>(tensor, start, count);
      p = tensor.master + start;
    } else {
      at::vec::convert(parameter + start, values, count);
    }
    const acc_t* g = as_accumulators(gradient + start, count, gradients);
    auto* mean = static_cast<acc_t*>(m) + start;
    auto* square = static_cast<acc_t*>(v) + start;
    if (largest != nullptr) {
      rule.template update<true>(count, p, g, mean, square, static_cast<acc_t*>(largest) + start);
    } else {
      rule.template update<false>(count, p, g, mean, square, nullptr);
    }
    store<scalar_t>(tensor, start, count, p);
    apply_mask<scalar_t>(tensor, start, count);
  }
}

}  // namespace

void adam(const std::vector<AdamTensor>& tensors) {
  for_each_range(tensors, [](const AdamTensor& tensor, int64_t begin, int64_t end) {
    with_type(tensor.type, [&](auto scalar) { update_adam<decltype(scalar)>(tensor, begin, end); });
  });
}

}  // namespace lightkit::cpu::optim
