// Cross-entropy of many rows side by side: for few classes, and for classes that are not the last dimension.
#pragma once

#include "../../common/ceil_div.h"
#include "../common/softcap.h"
#include "cross_entropy.h"

#include <algorithm>

namespace lightkit::cpu::cross_entropy {

// Works on tiles of as many rows as a vector has lanes: one class of a tile is one vector. Rows that lie one after the
// other are transposed on the way in and out; with inner > 1 they lie side by side already.
template <typename scalar_t>
class InterleavedRows {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  explicit InterleavedRows(const Rows<scalar_t>& args)
      : args_(args), positions_(positions(args)), tiles_(ceil_div(positions_, kLanes)) {
    // The last tile fills only some lanes; the others must hold numbers.
    std::fill_n(logits_, args.classes * kLanes, acc_t(0));
    std::fill_n(soft_, args.classes * kLanes, acc_t(0));
  }

  // Returns the tiles of all rows. With inner > 1 no tile reaches from one outer index into the next.
  static int64_t count(const Rows<scalar_t>& args) {
    return ceil_div(positions(args), kLanes) * (args.rows / positions(args));
  }

  void run(int64_t tile) {
    const int64_t outer = tile / tiles_;
    const int64_t position = tile % tiles_ * kLanes;
    const int rows = static_cast<int>(std::min(kLanes, positions_ - position));
    const int64_t first_row = outer * positions_ + position;
    const int64_t offset = args_.inner == 1 ? position * args_.classes : outer * args_.classes * args_.inner + position;

    read(args_.logits + offset, rows, logits_);
    if (args_.softcap != 0) {
      for (int64_t c = 0; c < args_.classes; ++c) {
        capped(at(logits_, c), args_.softcap).store(logits_ + c * kLanes);
      }
    }
    if (args_.probabilities != nullptr) {
      read(args_.probabilities + offset, rows, soft_);
    }
    forward(first_row, rows);
    if (args_.gradient != nullptr) {
      backward(first_row, rows);
      write(args_.gradient + offset, rows);
    }
  }

 private:
  static int64_t positions(const Rows<scalar_t>& args) {
    return args.inner == 1 ? args.rows : args.inner;
  }

  // Class c of a tile [classes, lanes].
  static Vec at(const acc_t* tile, int64_t c) {
    return Vec::loadu(tile + c * kLanes);
  }

  void read(
      const scalar_t* source,  // [rows, classes], or [classes, inner]
      int rows,
      acc_t* tile) {  // [classes, lanes]
    const int64_t classes = args_.classes;
    if (args_.inner == 1) {
      const acc_t* values = as_accumulators(source, rows * classes, results_);
      at::vec::transpose_mxn<acc_t>(values, classes, tile, kLanes, rows, static_cast<int>(classes));
    } else {
      for (int64_t c = 0; c < classes; ++c) {
        at::vec::convert(source + c * args_.inner, tile + c * kLanes, rows);
      }
    }
  }

  void write(
      scalar_t* gradient,  // [rows, classes], or [classes, inner]
      int rows) {
    const int64_t classes = args_.classes;
    if (args_.inner != 1) {
      for (int64_t c = 0; c < classes; ++c) {
        at::vec::convert(results_ + c * kLanes, gradient + c * args_.inner, rows);
      }
    } else if constexpr (is_half<scalar_t>) {
      at::vec::transpose_mxn<acc_t>(results_, kLanes, logits_, classes, static_cast<int>(classes), rows);
      at::vec::convert(logits_, gradient, rows * classes);
    } else {
      at::vec::transpose_mxn<acc_t>(results_, kLanes, gradient, classes, static_cast<int>(classes), rows);
    }
  }

  // The soft target of class c in every row.
  Vec soft(int64_t c) const {
    Vec value = Vec(args_.smooth == nullptr ? acc_t(0) : args_.smooth[c]);
    if (args_.probabilities != nullptr) {
      const acc_t factor = args_.confidence * (args_.weight == nullptr ? acc_t(1) : args_.weight[c]);
      value = value + Vec(factor) * at(soft_, c);
    }
    return value;
  }

  bool has_soft() const {
    return args_.smooth != nullptr || args_.probabilities != nullptr;
  }

  // Computes the losses, and what the gradient needs of each row. Leaves exp(u - maximum) in `results_`.
  void forward(int64_t first_row, int rows) {
    Vec maximum = at(logits_, 0);
    for (int64_t c = 1; c < args_.classes; ++c) {
      maximum = at::vec::clamp_min(at(logits_, c), maximum);
    }
    Vec sum(acc_t(0));
    Vec soft_sum(acc_t(0));
    Vec offset(acc_t(0));
    for (int64_t c = 0; c < args_.classes; ++c) {
      const Vec shifted = at(logits_, c) - maximum;
      const Vec e = exp_bounded(shifted);
      sum = sum + e;
      e.store(results_ + c * kLanes);
      if (has_soft()) {
        const Vec s = soft(c);
        soft_sum = soft_sum + s;
        offset = offset - s * shifted;
      }
    }
    const Vec log_sum = sum.log();
    const Vec lse = log_sum + maximum;
    sum.store(sums_);
    lse.store(lse_);
    soft_sum.store(soft_sums_);
    // The part that does not depend on the target: the soft part and z_loss lse^2.
    Vec loss = has_soft() ? soft_sum * log_sum + offset : Vec(acc_t(0));
    if (args_.z_loss != 0) {
      loss = loss + Vec(args_.z_loss) * lse * lse;
    }
    alignas(64) acc_t losses[kLanes], log_sums[kLanes], maxima[kLanes];
    loss.store(losses);
    log_sum.store(log_sums);
    maximum.store(maxima);

    for (int k = 0; k < rows; ++k) {
      hard_[k] = log_p_[k] = 0;
      ignored_[k] = false;
      if (args_.target != nullptr) {
        const int64_t target = args_.target[first_row + k];
        ignored_[k] = target == args_.ignore_index;
        if (ignored_[k]) {
          losses[k] = lse_[k] = 0;
        } else {
          hard_[k] = args_.confidence * (args_.weight == nullptr ? acc_t(1) : args_.weight[target]);
          log_p_[k] = -(log_sums[k] + (maxima[k] - logits_[target * kLanes + k]));
          losses[k] -= hard_[k] * log_p_[k];
        }
      }
    }
    std::copy_n(losses, rows, args_.losses + first_row);
    if (args_.lse != nullptr) {
      std::copy_n(lse_, rows, args_.lse + first_row);
    }
  }

  void backward(int64_t first_row, int rows) {
    const Vec scale(args_.gradient_scale);
    const Vec rest = Vec::loadu(soft_sums_) + Vec(2 * args_.z_loss) * Vec::loadu(lse_);
    const Vec total = Vec::loadu(hard_) + rest;
    const Vec factor = scale * total / Vec::loadu(sums_);
    for (int64_t c = 0; c < args_.classes; ++c) {
      Vec value = at(results_, c) * factor;
      if (has_soft()) {
        value = value - scale * soft(c);
      }
      if (args_.softcap != 0) {
        value = value * cap_slope(at(logits_, c), args_.softcap);
      }
      value.store(results_ + c * kLanes);
    }
    if (args_.target == nullptr) {
      return;
    }
    // p - 1 at the target is computed as expm1(log p), so that a confident row keeps its relative accuracy.
    alignas(64) acc_t at_target[kLanes];
    (scale * (total * Vec::loadu(log_p_).expm1() + rest)).store(at_target);
    for (int k = 0; k < rows; ++k) {
      if (ignored_[k]) {
        for (int64_t c = 0; c < args_.classes; ++c) {
          results_[c * kLanes + k] = 0;
        }
        continue;
      }
      const int64_t target = args_.target[first_row + k];
      acc_t value = at_target[k];
      if (args_.smooth != nullptr) {
        value -= args_.gradient_scale * args_.smooth[target];
      }
      if (args_.softcap != 0) {
        value *= cap_slope(logits_[target * kLanes + k], args_.softcap);
      }
      results_[target * kLanes + k] = value;
    }
  }

  const Rows<scalar_t>& args_;
  const int64_t positions_;
  const int64_t tiles_;                                     // per outer index
  alignas(64) acc_t logits_[kMaxStridedClasses * kLanes];   // [classes, lanes]
  alignas(64) acc_t soft_[kMaxStridedClasses * kLanes];     // [classes, lanes]
  alignas(64) acc_t results_[kMaxStridedClasses * kLanes];  // [classes, lanes]
  alignas(64) acc_t sums_[kLanes], lse_[kLanes], soft_sums_[kLanes], hard_[kLanes] = {}, log_p_[kLanes] = {};
  bool ignored_[kLanes];
};

}  // namespace lightkit::cpu::cross_entropy
