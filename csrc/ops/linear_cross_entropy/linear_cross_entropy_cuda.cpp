// lightkit::linear_cross_entropy on a GPU: cuBLAS's products of a slice of classes at a time, and the kernels on them.

#include "../common/checks.h"
#include "../common/element_type.h"
#include "linear_cross_entropy.h"

#include "../../kernels/cuda/linear_cross_entropy/linear_cross_entropy.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace lightkit {
namespace {

using at::Tensor;

// The fewest classes of a slice: products of fewer leave a device idle. Chosen on an H100, not measured elsewhere.
constexpr int64_t kMinClasses = 256;

void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr() : nullptr;
}

// The slices of one call.
class Slices {
 public:
  Slices(const LinearInputs& inputs, const CrossEntropyOptions& options, int64_t memory_limit)
      : options_(options),
        type_(inputs.hidden.scalar_type()),
        acc_type_(accumulation_type(type_)),
        acc_options_(inputs.hidden.options().dtype(acc_type_)),
        hidden_(inputs.hidden.contiguous()),
        head_(inputs.linear_weight.contiguous()),
        target_(inputs.target.to(at::kLong).contiguous()),
        counted_(target_.ne(options.ignore_index)),
        bias_(as_accumulators(inputs.linear_bias)),
        weight_(as_accumulators(inputs.weight)),
        rows_(hidden_.size(0)),
        classes_(head_.size(0)) {
    const auto acc_size = static_cast<int64_t>(at::elementSize(acc_type_));
    // A slice of logits and, if the types differ, a slice of gradients.
    const int64_t class_bytes = std::max<int64_t>(1, rows_) * (acc_size + (in_place() ? 0 : 2));
    const int64_t fitting = memory_limit / class_bytes;
    // If not everything fits, half of the memory keeps logits for the second pass.
    slice_ = fitting >= classes_ ? classes_ : std::min(classes_, std::max(kMinClasses, fitting / 2));
    const int64_t slice_bytes = std::max<int64_t>(1, slice_ * rows_ * acc_size);
    most_kept_ = slice_ == classes_ ? 1 : std::max<int64_t>(0, memory_limit - slice_ * class_bytes) / slice_bytes;
  }

  const Tensor& counted() const {
    return counted_;
  }

  const at::TensorOptions& acc_options() const {
    return acc_options_;
  }

  // The denominator of a mean.
  Tensor denominator() const {
    return (weight_.defined() ? target_weight() * counted_ : counted_.to(acc_type_)).sum(acc_type_);
  }

  // The first pass: losses [rows] and row statistics [3, rows]. With `keep`, the logits of the first slices stay for
  // the second pass.
  std::tuple<Tensor, Tensor> losses(bool keep) {
    const auto make = [&] { return empty({rows_}, acc_options_); };
    const Tensor maximum = make(), sum = make(), soft = make(), target_logit = make();
    for (int64_t begin = 0; begin < classes_; begin += slice_) {
      const Tensor logits = compute_logits(begin);
      auto args = arguments(logits, begin);
      args.maximum = maximum.data_ptr();
      args.sum = sum.data_ptr();
      args.soft = soft.data_ptr();
      args.target_logit = target_logit.data_ptr();
      C10_CUDA_CHECK(cuda::linear_cross_entropy::add_slice(args, c10::cuda::getCurrentCUDAStream()));
      if (keep && static_cast<int64_t>(kept_.size()) < most_kept_) {
        kept_.push_back(logits);
      }
    }
    const Tensor log_sum = sum.log(), lse = log_sum + maximum;
    // log(sum) + (maximum - u): the large parts cancel exactly.
    const Tensor negative_log_p = log_sum + (maximum - target_logit);
    Tensor loss = hard() * negative_log_p;
    if (options_.label_smoothing > 0) {
      loss = loss + soft_total() * lse - share() * soft;
    }
    if (options_.z_loss != 0) {
      loss = loss + options_.z_loss * lse.square();
    }
    return {loss.masked_fill(counted_.logical_not(), 0), at::stack({maximum, log_sum, -negative_log_p})};
  }

  // The second pass: gradients of the losses times `scale`, [rows] or [].
  LinearGradients gradients(
      const LinearInputs& inputs, const Tensor& row_statistics, const Tensor& scale, const WantedGradients& wanted) {
    const Tensor maximum = row_statistics.select(0, 0), log_sum = row_statistics.select(0, 1),
                 log_p = row_statistics.select(0, 2);
    const Tensor lse = maximum + log_sum;
    const Tensor rest = soft_total() + 2 * options_.z_loss * lse;
    const auto per_row = [&](const Tensor& values) { return values.expand({rows_}).contiguous(); };
    const Tensor factor = per_row(scale * (hard() + rest) * (-log_sum).exp()), soft_factor = per_row(scale * share());
    // p - 1 is computed as expm1(log p), so that a confident row keeps its relative accuracy.
    Tensor target_gradient = per_row(scale * ((hard() + rest) * log_p.expm1() + (rest - share() * target_weight())));
    if (options_.softcap != 0) {
      target_gradient = target_gradient * (1 - ((log_p + lse) / options_.softcap).square());
    }

    auto [of_hidden, of_weight, of_bias] = no_gradients(hidden_.options());
    if (wanted.hidden) {
      of_hidden = zeros({rows_, hidden_.size(1)}, acc_options_);
    }
    if (wanted.linear_weight) {
      of_weight = empty_like(head_);
    }
    if (wanted.linear_bias) {
      of_bias = empty({classes_}, acc_options_);
    }
    for (int64_t begin = 0, index = 0; begin < classes_; begin += slice_, ++index) {
      const bool is_kept = index < static_cast<int64_t>(kept_.size());
      const Tensor logits = is_kept ? std::exchange(kept_[index], Tensor()) : compute_logits(begin);
      const Tensor gradient = in_place() ? logits : empty(logits.sizes(), hidden_.options());
      auto args = arguments(logits, begin);
      args.maximum = maximum.data_ptr();
      args.factor = factor.data_ptr();
      args.soft_factor = soft_factor.data_ptr();
      args.target_gradient = target_gradient.data_ptr();
      args.gradient = gradient.data_ptr();
      C10_CUDA_CHECK(cuda::linear_cross_entropy::slice_gradient(args, c10::cuda::getCurrentCUDAStream()));
      if (wanted.linear_weight) {
        Tensor place = of_weight.narrow(0, begin, logits.size(1));
        at::mm_out(place, gradient.t(), hidden_);
      }
      if (wanted.linear_bias) {
        of_bias.narrow(0, begin, logits.size(1)).copy_(gradient.sum(0, /*keepdim=*/false, acc_type_));
      }
      if (wanted.hidden) {
        const Tensor weights = head_.narrow(0, begin, logits.size(1));
        if (in_place()) {
          of_hidden.addmm_(gradient, weights);
        } else {
          at::addmm_out(of_hidden, of_hidden, gradient, weights, acc_type_);
        }
      }
    }
    return {
        of_hidden.to(type_), of_weight, wanted.linear_bias ? of_bias.to(inputs.linear_bias->scalar_type()) : of_bias};
  }

 private:
  // Gradients with respect to logits replace the logits if the types agree.
  bool in_place() const {
    return acc_type_ == type_;
  }

  Tensor as_accumulators(const std::optional<Tensor>& tensor) const {
    return is_there(tensor) ? tensor->to(acc_type_).contiguous() : Tensor();
  }

  Tensor compute_logits(int64_t begin) const {
    const Tensor weights = head_.narrow(0, begin, std::min(slice_, classes_ - begin)).t();
    return in_place() ? at::mm(hidden_, weights) : at::mm(hidden_, weights, acc_type_);
  }

  double share() const {
    return options_.label_smoothing / static_cast<double>(classes_);
  }

  Tensor soft_total() const {
    return share() * (weight_.defined() ? weight_.sum() : full({}, static_cast<double>(classes_), acc_options_));
  }

  // The class weight of each row's target, [rows]; any number for ignored rows.
  Tensor target_weight() const {
    return weight_.defined() ? weight_.index_select(0, target_.where(counted_, 0)) : full({rows_}, 1, acc_options_);
  }

  Tensor hard() const {
    return (1 - options_.label_smoothing) * target_weight();
  }

  cuda::linear_cross_entropy::Slice arguments(const Tensor& logits, int64_t begin) const {
    cuda::linear_cross_entropy::Slice args{};
    args.type = element_type(type_).value();
    args.logits = logits.data_ptr();
    args.rows = rows_;
    args.begin = begin;
    args.classes = logits.size(1);
    args.all_classes = classes_;
    args.target = target_.const_data_ptr<int64_t>();
    args.ignore_index = options_.ignore_index;
    args.bias = data_or_null(bias_);
    args.weight = data_or_null(weight_);
    args.smooth = options_.label_smoothing > 0;
    args.softcap = options_.softcap;
    return args;
  }

  const CrossEntropyOptions options_;
  const at::ScalarType type_, acc_type_;
  const at::TensorOptions acc_options_;
  const Tensor hidden_, head_, target_, counted_, bias_, weight_;
  const int64_t rows_, classes_;
  int64_t slice_, most_kept_;
  std::vector<Tensor> kept_;  // logits of the first slices
};

}  // namespace

LinearResults linear_forward_cuda(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  check_memory(inputs);
  Slices slices(inputs, options, memory_limit);
  const auto [losses, row_statistics] = slices.losses(/*keep=*/wanted.any());
  const bool mean = options.reduction == Reduction::Mean;
  const Tensor denominator = mean ? slices.denominator() : full({}, 1, slices.acc_options());
  const auto loss_type = options.dtype.value_or(hidden.scalar_type());
  const Tensor loss = options.reduction == Reduction::None ? losses : losses.sum() / denominator;
  LinearGradients gradients = no_gradients(hidden.options());
  if (wanted.any()) {
    // Without a row that counts, the denominator is 0.
    const Tensor scale = denominator.reciprocal().masked_fill(denominator.eq(0), 0);
    gradients = slices.gradients(inputs, row_statistics, scale, wanted);
  }
  auto& [of_hidden, of_weight, of_bias] = gradients;
  return {loss.to(loss_type), row_statistics, of_hidden, of_weight, of_bias};
}

LinearGradients linear_backward_cuda(
    const Tensor& grad_loss,
    const Tensor& row_statistics,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  check_backward_arguments(grad_loss, row_statistics, inputs, options);
  check_memory(inputs);
  check_memory("linear_cross_entropy", "grad_loss", grad_loss);
  check_memory("linear_cross_entropy", "row_statistics", row_statistics);
  Slices slices(inputs, options, memory_limit);
  Tensor scale = grad_loss.to(row_statistics.scalar_type());
  if (options.reduction == Reduction::Mean) {
    scale = scale / slices.denominator();
  }
  return slices.gradients(inputs, row_statistics.contiguous(), scale, wanted);
}

}  // namespace lightkit
