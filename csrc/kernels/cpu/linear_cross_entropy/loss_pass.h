// The first pass of the fused linear cross-entropy over a chunk of rows: the losses, and what the gradients need of
// each row.
#pragma once

#include "state.h"

#include <cmath>
#include <limits>
#include <optional>

namespace lightkit::cpu::linear_cross_entropy {

template <typename scalar_t, typename operand_t>
class LossPass {
  using acc_t = accumulator_t<scalar_t>;

 public:
  explicit LossPass(State<scalar_t, operand_t>& state) : state_(state), args_(state.args) {
    if (args_.smoothing != 0) {
      double sum = 0;
      for (int64_t c = 0; c < args_.classes; ++c) {
        sum += args_.weight == nullptr ? 1 : args_.weight[c];
      }
      weight_sum_ = static_cast<acc_t>(sum);
    }
  }

  void run() {
    if (args_.losses != nullptr) {
      sum_exponentials();
    }
    finish_rows();
  }

 private:
  void sum_exponentials() {
    const int64_t row_blocks = state_.row_blocks();
    // Consecutive items share the weights.
    state_.for_each(state_.class_blocks() * row_blocks, [&](int64_t item, auto& scratch) {
      const int64_t b = item / row_blocks;
      const RowBlock block = state_.row_block(item % row_blocks);
      const auto panel = state_.transposed_hidden(block, scratch);
      const RowSums<acc_t> sums = state_.sums(b, block.begin);
      sums.reset(block.padded);
      const int64_t end = std::min((b + 1) * kSumClasses, args_.classes);
      for (int64_t c = b * kSumClasses; c < end; c += kTileClasses) {
        const auto tile = state_.compute_logits(block, c, std::min(kTileClasses, end - c), panel, scratch);
        const auto kept = c < state_.plan.kept ? std::optional(state_.kept_tile(c, block.begin)) : std::nullopt;
        tile.add_to(sums, kept ? &*kept : nullptr);
        tile.pick_targets(state_.targets(block.begin), block.count, state_.target_logits() + block.begin);
      }
    });
  }

  // Computes the losses and the parts of the gradients of all rows. ../cross_entropy/cross_entropy.h has the formulas.
  void finish_rows() {
    const RowGradients<acc_t> out = state_.row_gradients(0);
    const RowStatistics<acc_t>& statistics = args_.row_statistics;
    const acc_t share = args_.smoothing / static_cast<acc_t>(args_.classes);
    const acc_t soft = share * weight_sum_;
    for (int64_t r = 0; r < state_.count; ++r) {
      const int64_t row = state_.first + r;
      const acc_t target_weight = args_.weight == nullptr ? acc_t(1) : args_.weight[args_.target[row]];
      const acc_t hard = (1 - args_.smoothing) * target_weight;
      if (args_.losses != nullptr) {
        finish_loss(r, hard, soft, share);
      }
      if (args_.gradient_scale == nullptr) {
        continue;
      }
      const acc_t log_p = statistics.target_log_p[row], lse = statistics.maximum[row] + statistics.log_sum[row];
      const acc_t scale = args_.gradient_scale[row];
      const acc_t rest = soft + 2 * args_.z_loss * lse;
      out.maximum[r] = statistics.maximum[row];
      out.factor[r] = scale * (hard + rest) * std::exp(-statistics.log_sum[row]);
      out.soft[r] = scale * share;
      // p - 1 is computed as expm1(log p), so that a confident row keeps its relative accuracy; it is rounded once.
      out.target[r] = scale * ((hard + rest) * std::expm1(log_p) + (rest - share * target_weight));
      if (args_.softcap != 0) {
        out.target[r] *= cap_slope(log_p + lse, args_.softcap);
      }
    }
    for (int64_t r = state_.count; r < state_.padded; ++r) {
      // Rows that fill the last vector have gradient 0.
      out.maximum[r] = std::numeric_limits<acc_t>::max();
      out.factor[r] = out.soft[r] = 0;
    }
  }

  void finish_loss(int64_t r, acc_t hard, acc_t soft, acc_t share) {
    const int64_t blocks = state_.class_blocks();
    acc_t maximum = std::numeric_limits<acc_t>::lowest();
    for (int64_t b = 0; b < blocks; ++b) {
      maximum = std::max(maximum, *state_.sums(b, r).maximum);
    }
    double sum = 0, soft_logits = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const RowSums<acc_t> part = state_.sums(b, r);
      sum += static_cast<double>(*part.sum) * std::exp(static_cast<double>(*part.maximum) - maximum);
      soft_logits += *part.soft;
    }
    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const auto log_sum = static_cast<acc_t>(sum > 0 ? std::log(sum) : std::numeric_limits<double>::quiet_NaN());
    // log(sum) + (maximum - u): the large parts cancel exactly.
    const acc_t negative_log_p = log_sum + (maximum - state_.target_logits()[r]);
    acc_t loss = hard * negative_log_p;
    if (args_.smoothing != 0) {
      loss += static_cast<acc_t>(soft * (static_cast<double>(log_sum) + maximum) - share * soft_logits);
    }
    if (args_.z_loss != 0) {
      loss += args_.z_loss * (log_sum + maximum) * (log_sum + maximum);
    }
    const int64_t row = state_.first + r;
    args_.losses[row] = loss;
    args_.row_statistics.maximum[row] = maximum;
    args_.row_statistics.log_sum[row] = log_sum;
    args_.row_statistics.target_log_p[row] = -negative_log_p;
  }

  State<scalar_t, operand_t>& state_;
  const Problem<scalar_t>& args_;
  acc_t weight_sum_ = 0;
};

}  // namespace lightkit::cpu::linear_cross_entropy
