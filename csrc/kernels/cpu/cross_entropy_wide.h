// Cross-entropy of rows that fill the vector unit: one row at a time, in blocks.
#pragma once

#include "cross_entropy.h"
#include "cross_entropy_softcap.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace lightkit::cpu {

// A row is walked in blocks that stay in the first-level cache between their two uses.
constexpr int64_t kBlock = 1024;

// One row of the wide path: hands out its blocks as accumulators, with the softcap and the soft targets done.
template <typename scalar_t>
class Row {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;

  Row(const CrossEntropyRows<scalar_t>& args, int64_t row) : args_(args), offset_(row * args.classes) {}

  const acc_t* logits(int64_t start, int64_t count) {
    const acc_t* z = as_accumulators(args_.logits + offset_ + start, count, logits_);
    if (args_.softcap != 0) {
      for_each_vector<acc_t>(count, [&](int64_t i, int64_t n) {
        capped(Vec::loadu(z + i, n), args_.softcap).store(logits_ + i, static_cast<int>(n));
      });
      return logits_;
    }
    return z;
  }

  // Soft targets of a block, or null where there are none.
  const acc_t* soft(int64_t start, int64_t count) {
    if (args_.probabilities == nullptr) {
      return args_.smooth == nullptr ? nullptr : args_.smooth + start;
    }
    const acc_t* q = as_accumulators(args_.probabilities + offset_ + start, count, soft_);
    for_each_vector<acc_t>(count, [&](int64_t i, int64_t n) {
      Vec value = Vec::loadu(q + i, n) * Vec(args_.confidence);
      if (args_.weight != nullptr) {
        value = value * Vec::loadu(args_.weight + start + i, n);
      }
      if (args_.smooth != nullptr) {
        value = value + Vec::loadu(args_.smooth + start + i, n);
      }
      value.store(soft_ + i, static_cast<int>(n));
    });
    return soft_;
  }

  // Fetches the cache line of an element one block on, in this row or the next, while there is work to do.
  void prefetch(int64_t index) const {
    __builtin_prefetch(args_.logits + offset_ + index + kBlock);
  }

  // Room for a block of results.
  acc_t* results() {
    return results_;
  }

 private:
  const CrossEntropyRows<scalar_t>& args_;
  const int64_t offset_;
  alignas(64) acc_t logits_[kBlock];
  alignas(64) acc_t soft_[kBlock];
  alignas(64) acc_t results_[kBlock];
};

template <typename acc_t>
struct Normalizer {
  acc_t maximum;
  acc_t sum;        // of exp(u - maximum)
  acc_t soft_sum;   // of the soft targets
  acc_t offset;     // sum of soft * (pivot - u)
};

// Maximum of a block, starting from `maximum`. NaN may or may not come through: the sum is what carries it.
template <typename acc_t>
acc_t block_maximum(const acc_t* u, int64_t count, acc_t maximum) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t width = Vec::size();
  std::array<Vec, 4> lanes;
  lanes.fill(Vec(maximum));
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    for (int k = 0; k < 4; ++k) {
      lanes[k] = at::vec::clamp_min(Vec::loadu(u + i + k * width), lanes[k]);
    }
  }
  for_each_vector<acc_t>(count - i, [&](int64_t j, int64_t n) {
    lanes[0] = at::vec::clamp_min(load(u + i + j, n, maximum), lanes[0]);
  });
  const Vec all = at::vec::maximum(at::vec::maximum(lanes[0], lanes[1]), at::vec::maximum(lanes[2], lanes[3]));
  return std::max(maximum, horizontal_max(all));
}

// One read of a row: the maximum is followed block by block, and the sum rescaled when it rises.
template <typename scalar_t>
Normalizer<accumulator_t<scalar_t>> normalize(
    const CrossEntropyRows<scalar_t>& args, Row<scalar_t>& row, accumulator_t<scalar_t> pivot) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t width = Vec::size();

  // The lowest finite number rather than -inf: -inf - -inf would make NaN of a block of -inf.
  acc_t maximum = std::numeric_limits<acc_t>::lowest();
  std::array<Vec, 4> sums;
  sums.fill(Vec(acc_t(0)));
  Vec soft_sum(acc_t(0));
  Vec offset(acc_t(0));

  for (int64_t start = 0; start < args.classes; start += kBlock) {
    const int64_t count = std::min(kBlock, args.classes - start);
    const acc_t* u = row.logits(start, count);

    const acc_t raised = block_maximum(u, count, maximum);
    if (raised > maximum) {
      const Vec rescale(std::exp(maximum - raised));
      for (auto& sum : sums) {
        sum = sum * rescale;
      }
      maximum = raised;
    }

    const Vec shift(maximum);
    int64_t i = 0;
    for (; i + 4 * width <= count; i += 4 * width) {
      for (int k = 0; k < 4; ++k) {
        row.prefetch(start + i + k * width);
        sums[k] = sums[k] + exp_nonpositive(Vec::loadu(u + i + k * width) - shift);
      }
    }
    for_each_vector<acc_t>(count - i, [&](int64_t j, int64_t n) {
      sums[0] = sums[0] + exp_nonpositive(load(u + i + j, n, -std::numeric_limits<acc_t>::infinity()) - shift);
    });

    if (const acc_t* soft = row.soft(start, count); soft != nullptr) {
      for_each_vector<acc_t>(count, [&](int64_t j, int64_t n) {
        const Vec s = Vec::loadu(soft + j, n);
        soft_sum = soft_sum + s;
        offset = at::vec::fmadd(s, Vec(pivot) - load(u + j, n, pivot), offset);
      });
    }
  }
  const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return {maximum, horizontal_sum(sum), horizontal_sum(soft_sum), horizontal_sum(offset)};
}

// gradient = (exp(u - maximum) * factor - scale * soft) du/dz
template <typename scalar_t>
void write_gradient(
    const CrossEntropyRows<scalar_t>& args,
    Row<scalar_t>& row,
    scalar_t* gradient,
    accumulator_t<scalar_t> maximum,
    accumulator_t<scalar_t> factor) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  const Vec scale(args.gradient_scale);

  for (int64_t start = 0; start < args.classes; start += kBlock) {
    const int64_t count = std::min(kBlock, args.classes - start);
    const acc_t* u = row.logits(start, count);
    const acc_t* soft = row.soft(start, count);
    acc_t* out;
    if constexpr (is_half<scalar_t>) {
      out = row.results();
    } else {
      out = gradient + start;
    }
    for_each_vector<acc_t>(count, [&](int64_t i, int64_t n) {
      const Vec logit = Vec::loadu(u + i, n);
      Vec value = exp_nonpositive(logit - Vec(maximum)) * Vec(factor);
      if (soft != nullptr) {
        value = value - scale * Vec::loadu(soft + i, n);
      }
      if (args.softcap != 0) {
        value = value * cap_slope(logit, args.softcap);
      }
      value.store(out + i, static_cast<int>(n));
    });
    if constexpr (is_half<scalar_t>) {
      at::vec::convert(out, gradient + start, count);
    }
  }
}

template <typename scalar_t>
void wide_rows(const CrossEntropyRows<scalar_t>& args, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  for (int64_t r = begin; r < end; ++r) {
    scalar_t* gradient = args.gradient == nullptr ? nullptr : args.gradient + r * args.classes;
    const int64_t target = args.target == nullptr ? 0 : args.target[r];
    if (args.target != nullptr && target == args.ignore_index) {
      args.losses[r] = 0;
      if (args.lse != nullptr) {
        args.lse[r] = 0;
      }
      if (gradient != nullptr) {
        std::fill_n(gradient, args.classes, scalar_t(0));
      }
      continue;
    }

    Row<scalar_t> row(args, r);
    const acc_t u_target = capped(static_cast<acc_t>(args.logits[r * args.classes + target]), args.softcap);
    // Differences from one of the logits keep the soft part accurate for logits far from 0.
    const acc_t pivot = std::isfinite(u_target) ? u_target : acc_t(0);
    const auto norm = normalize(args, row, pivot);
    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const acc_t sum = norm.sum > 0 ? norm.sum : std::numeric_limits<acc_t>::quiet_NaN();
    const acc_t log_sum = std::log(sum);
    const acc_t lse = log_sum + norm.maximum;
    const acc_t hard = args.target == nullptr ? acc_t(0)
                                              : args.confidence * (args.weight == nullptr ? acc_t(1) : args.weight[target]);

    // lse - u_target as log(sum) + (max - u_target): the large parts cancel exactly.
    const acc_t negative_log_p = log_sum + (norm.maximum - u_target);
    acc_t loss = args.z_loss == 0 ? acc_t(0) : args.z_loss * lse * lse;
    if (args.target != nullptr) {
      loss += hard * negative_log_p;
    }
    if (args.smooth != nullptr || args.probabilities != nullptr) {
      loss += norm.soft_sum * (log_sum + (norm.maximum - pivot)) + norm.offset;
    }
    args.losses[r] = loss;
    if (args.lse != nullptr) {
      args.lse[r] = lse;
    }
    if (gradient == nullptr) {
      continue;
    }

    const acc_t rest = norm.soft_sum + 2 * args.z_loss * lse;
    write_gradient(args, row, gradient, norm.maximum, args.gradient_scale * (hard + rest) / sum);
    if (args.target != nullptr) {
      // p - 1 as expm1(log p), so that a confident row keeps its relative accuracy; rounded once.
      const acc_t soft_target = args.smooth == nullptr ? acc_t(0) : args.smooth[target];
      acc_t value = args.gradient_scale * ((hard + rest) * std::expm1(-negative_log_p) + (rest - soft_target));
      if (args.softcap != 0) {
        value *= cap_slope(u_target, args.softcap);
      }
      gradient[target] = static_cast<scalar_t>(value);
    }
  }
}

}  // namespace lightkit::cpu
