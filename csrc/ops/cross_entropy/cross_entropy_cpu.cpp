// lightkit::cross_entropy on a CPU: checks of the targets, memory, and the kernel.

#include "../../kernels/cpu/cross_entropy/cross_entropy.h"
#include "../common/checks.h"
#include "../common/tensors.h"
#include "cross_entropy.h"

#include <c10/util/SmallBuffer.h>

#include <algorithm>
#include <numeric>

namespace lightkit {
namespace {

using at::Tensor;

// Checks every target, and returns the denominator of a mean: the summed weight of the rows that count.
template <typename acc_t>
double check_targets(const CrossEntropyProblem& problem, int64_t ignore_index) {
  if (!problem.target.defined()) {
    return static_cast<double>(problem.rows);
  }
  const int64_t* target = problem.target.const_data_ptr<int64_t>();
  const acc_t* weight = problem.weight.defined() ? problem.weight.const_data_ptr<acc_t>() : nullptr;
  int64_t counted = 0;
  double weights = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (target[row] == ignore_index) {
      continue;
    }
    TORCH_CHECK_INDEX(
        target[row] >= 0 && target[row] < problem.classes,
        "cross_entropy: Target ",
        target[row],
        " is out of bounds: row ",
        row,
        " of the target must name one of the ",
        problem.classes,
        " classes (0 to ",
        problem.classes - 1,
        ") or be ignore_index (",
        ignore_index,
        ")");
    ++counted;
    if (weight != nullptr) {
      weights += static_cast<double>(weight[target[row]]);
    }
  }
  return weight == nullptr ? static_cast<double>(counted) : weights;
}

// Sums in an order that depends on the count alone, so that the loss does not depend on the number of threads.
template <typename acc_t>
double ordered_sum(const acc_t* values, int64_t count) {
  constexpr int64_t lanes = 8;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t k = 0; k < lanes; ++k) {
      sums[k] += values[i + k];
    }
  }
  for (; i < count; ++i) {
    sums[i % lanes] += values[i];
  }
  return std::accumulate(sums, sums + lanes, 0.0);
}

// at::scalar_tensor, without fill_ for the common dtypes.
Tensor scalar(double value, const at::TensorOptions& options) {
  Tensor tensor = empty({}, options);
  switch (tensor.scalar_type()) {
    case at::kFloat:
      *tensor.mutable_data_ptr<float>() = static_cast<float>(value);
      return tensor;
    case at::kDouble:
      *tensor.mutable_data_ptr<double>() = value;
      return tensor;
    default:
      return tensor.fill_(value);
  }
}

// Returns loss and lse. Writes the gradient to `gradient`, laid out as `problem.logits`, unless that is undefined.
template <typename scalar_t>
std::tuple<Tensor, Tensor> run(
    const CrossEntropyProblem& problem,
    const Tensor& logits,
    const CrossEntropyOptions& options,
    const Tensor& gradient,
    bool with_lse) {
  using acc_t = cpu::accumulator_t<scalar_t>;
  const double denominator = check_targets<acc_t>(problem, options.ignore_index);
  const auto acc_options = logits.options().dtype(accumulation_type(logits.scalar_type()));
  // Without classes the kernel writes nothing.
  const auto make = [&](at::IntArrayRef sizes) {
    return problem.classes == 0 ? zeros(sizes, acc_options) : empty(sizes, acc_options);
  };
  const bool reduced = options.reduction != Reduction::None;
  // Losses that are only summed need no tensor. Without classes they are 0, and there may be more rows than memory.
  const Tensor row_losses = reduced ? Tensor() : make({problem.rows});
  c10::SmallBuffer<acc_t, 512> summands(reduced && problem.classes > 0 ? problem.rows : 0);
  const Tensor lse = with_lse ? make(loss_sizes(logits)) : empty({0}, acc_options);
  const bool mean = options.reduction == Reduction::Mean;

  cpu::cross_entropy::run<scalar_t>({
      .logits = problem.logits.const_data_ptr<scalar_t>(),
      .rows = problem.rows,
      .classes = problem.classes,
      .inner = problem.inner,
      .target = data_or_null<int64_t>(problem.target),
      .probabilities = data_or_null<scalar_t>(problem.probabilities),
      .ignore_index = options.ignore_index,
      .weight = data_or_null<acc_t>(problem.weight),
      .smooth = data_or_null<acc_t>(problem.smooth),
      .confidence = static_cast<acc_t>(1 - options.label_smoothing),
      .z_loss = static_cast<acc_t>(options.z_loss),
      .softcap = static_cast<acc_t>(options.softcap),
      .gradient_scale = static_cast<acc_t>(mean ? 1 / denominator : 1),
      .losses = reduced ? summands.data() : row_losses.mutable_data_ptr<acc_t>(),
      .lse = with_lse ? lse.mutable_data_ptr<acc_t>() : nullptr,
      .gradient = gradient.defined() ? gradient.mutable_data_ptr<scalar_t>() : nullptr,
  });

  const auto loss_type = options.dtype.value_or(logits.scalar_type());
  if (!reduced) {
    return {row_losses.view(loss_sizes(logits)).to(loss_type), lse};
  }
  return {
      scalar(
          ordered_sum(summands.data(), summands.size()) / (mean ? denominator : 1), logits.options().dtype(loss_type)),
      lse};
}

std::tuple<Tensor, Tensor> dispatch(
    const CrossEntropyProblem& problem,
    const Tensor& logits,
    const CrossEntropyOptions& options,
    const Tensor& gradient,
    bool with_lse) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return run<float>(problem, logits, options, gradient, with_lse);
    case at::kDouble:
      return run<double>(problem, logits, options, gradient, with_lse);
    case at::kBFloat16:
      return run<at::BFloat16>(problem, logits, options, gradient, with_lse);
    default:
      return run<at::Half>(problem, logits, options, gradient, with_lse);
  }
}

constexpr CrossEntropyDevice kDevice{dispatch, pooled_empty_like, cpu::cross_entropy::kMaxStridedClasses};

}  // namespace

Results cross_entropy_forward_cpu(
    const Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_gradient,
    bool with_lse) {
  return run_forward(kDevice, logits, target, weight, make_options(LIGHTKIT_OPTION_ARGUMENTS), with_gradient, with_lse);
}

std::tuple<Tensor, Tensor> cross_entropy_inplace_cpu(
    Tensor& logits,
    const Tensor& target,
    const std::optional<Tensor>& weight,
    LIGHTKIT_OPTION_PARAMETERS,
    bool with_lse) {
  return run_forward_inplace(kDevice, logits, target, weight, make_options(LIGHTKIT_OPTION_ARGUMENTS), with_lse);
}

}  // namespace lightkit
