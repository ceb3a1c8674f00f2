// Cross-entropy of rows that fill the vector unit: one row at a time, in blocks.
//
// The first pass reads the logits and leaves exp(u - shift) of every block in memory that stays in the caches,
// with the shift that the block had: the largest logit so far. The second pass is a multiplication by what
// brings each block to the sum of the whole row.
#pragma once

#include "cross_entropy.h"
#include "cross_entropy_softcap.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace lightkit::cpu {

// A block stays in the first-level cache between its two uses.
constexpr int64_t kBlock = 1024;

// Gradients from this size on are stored past the caches: they would not stay there anyway.
constexpr int64_t kStreamedBytes = int64_t(32) << 20;

// In double, and with errors that grow with the logarithm of the count: equal values round the same way.
template <typename acc_t>
double pairwise_sum(const acc_t* values, int64_t count) {
  if (count <= 16) {
    return std::accumulate(values, values + count, 0.0);
  }
  return pairwise_sum(values, count / 2) + pairwise_sum(values + count / 2, count - count / 2);
}

// The rows that one thread works on. `extras`: there may be a softcap or soft targets.
template <typename scalar_t, bool extras>
class WideRows {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  using Values = Pack<scalar_t>;

  explicit WideRows(const CrossEntropyRows<scalar_t>& args)
      : args_(args),
        streamed_(
            args.gradient != args.logits &&
            args.rows * args.classes * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamedBytes),
        // The last pack of a row is stored whole.
        exponentials_(((args.gradient == nullptr ? std::min(kBlock, args.classes) : args.classes) + Values::size)),
        shifts_((args.classes + kBlock - 1) / kBlock) {
    if (args.smooth != nullptr) {
      smooth_sum_ = static_cast<acc_t>(pairwise_sum(args.smooth, args.classes));
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (args_.target != nullptr && args_.target[r] == args_.ignore_index) {
        ignore(r);
      } else {
        run(r);
      }
    }
    if (streamed_) {
      stream_fence();
    }
  }

 private:
  struct Normalizer {
    acc_t maximum;
    acc_t sum;       // of exp(u - maximum)
    acc_t soft_sum;  // of the soft targets
    acc_t offset;    // sum of soft * (pivot - u)
  };

  void ignore(int64_t r) {
    args_.losses[r] = 0;
    if (args_.lse != nullptr) {
      args_.lse[r] = 0;
    }
    if (args_.gradient != nullptr) {
      std::fill_n(args_.gradient + r * args_.classes, args_.classes, scalar_t(0));
    }
  }

  void run(int64_t r) {
    const scalar_t* logits = args_.logits + r * args_.classes;
    const scalar_t* probabilities = args_.probabilities == nullptr ? nullptr : args_.probabilities + r * args_.classes;
    const int64_t target = args_.target == nullptr ? 0 : args_.target[r];
    const acc_t u_target = capped(static_cast<acc_t>(logits[target]), args_.softcap);
    // Differences from one of the logits keep the soft part accurate for logits far from 0.
    const acc_t pivot = std::isfinite(u_target) ? u_target : acc_t(0);
    const Normalizer norm = normalize(logits, probabilities, pivot);
    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const acc_t sum = norm.sum > 0 ? norm.sum : std::numeric_limits<acc_t>::quiet_NaN();
    const acc_t log_sum = std::log(sum);
    const acc_t lse = log_sum + norm.maximum;
    const acc_t hard = args_.target == nullptr
        ? acc_t(0)
        : args_.confidence * (args_.weight == nullptr ? acc_t(1) : args_.weight[target]);

    // lse - u_target as log(sum) + (max - u_target): the large parts cancel exactly.
    const acc_t negative_log_p = log_sum + (norm.maximum - u_target);
    acc_t loss = args_.z_loss == 0 ? acc_t(0) : args_.z_loss * lse * lse;
    if (args_.target != nullptr) {
      loss += hard * negative_log_p;
    }
    if (args_.smooth != nullptr || args_.probabilities != nullptr) {
      loss += norm.soft_sum * (log_sum + (norm.maximum - pivot)) + norm.offset;
    }
    args_.losses[r] = loss;
    if (args_.lse != nullptr) {
      args_.lse[r] = lse;
    }
    if (args_.gradient == nullptr) {
      return;
    }

    scalar_t* gradient = args_.gradient + r * args_.classes;
    const acc_t rest = norm.soft_sum + 2 * args_.z_loss * lse;
    write_gradient(logits, probabilities, gradient, norm.maximum, args_.gradient_scale * (hard + rest) / sum);
    if (args_.target != nullptr) {
      // p - 1 as expm1(log p), so that a confident row keeps its relative accuracy; rounded once.
      const acc_t soft_target = args_.smooth == nullptr ? acc_t(0) : args_.smooth[target];
      acc_t value = args_.gradient_scale * ((hard + rest) * std::expm1(-negative_log_p) + (rest - soft_target));
      if (args_.softcap != 0) {
        value *= cap_slope(u_target, args_.softcap);
      }
      gradient[target] = static_cast<scalar_t>(value);
    }
  }

  // `count` logits with the softcap, the missing ones -inf: they add nothing to a sum of exponentials.
  Values logits_at(const scalar_t* logits, int64_t count) const {
    Values u = Values::load(logits, count, -std::numeric_limits<scalar_t>::infinity());
    if constexpr (extras) {
      if (args_.softcap != 0) {
        for (int k = 0; k < Values::parts; ++k) {
          const int64_t lanes = std::clamp<int64_t>(count - k * Vec::size(), 0, Vec::size());
          // The cap of -inf is a number.
          u.part[k] = Vec::set(Vec(-std::numeric_limits<acc_t>::infinity()), capped(u.part[k], args_.softcap), lanes);
        }
      }
    }
    return u;
  }

  // Soft targets of `count` classes from `c` on, the missing ones 0.
  Values soft_at(const scalar_t* probabilities, int64_t c, int64_t count) const {
    Values soft;
    if (probabilities != nullptr) {
      soft = Values::load(probabilities + c, count);
    }
    for (int k = 0; k < Values::parts; ++k) {
      const int64_t lanes = std::clamp<int64_t>(count - k * Vec::size(), 0, Vec::size());
      Vec& value = soft.part[k];
      value = probabilities == nullptr ? Vec(acc_t(0)) : value * Vec(args_.confidence);
      if (probabilities != nullptr && args_.weight != nullptr) {
        value = value * Vec::loadu(args_.weight + c + k * Vec::size(), lanes);
      }
      if (args_.smooth != nullptr) {
        value = value + Vec::loadu(args_.smooth + c + k * Vec::size(), lanes);
      }
    }
    return soft;
  }

  bool has_soft() const {
    return extras && (args_.smooth != nullptr || args_.probabilities != nullptr);
  }

  // The largest of a block. NaN may or may not come through: the sum is what carries it.
  acc_t block_maximum(const scalar_t* logits, int64_t count) const {
    // The lowest finite number rather than -inf: -inf - -inf would make NaN of a block of -inf.
    const Vec lowest(std::numeric_limits<acc_t>::lowest());
    std::array<Vec, 2> lanes{lowest, lowest};
    int64_t i = 0;
    for (; i + 2 * Vec::size() <= count; i += 2 * Vec::size()) {
      for (int j = 0; j < 2; j += Values::parts) {
        const Values u = logits_at(logits + i + j * Vec::size(), Values::size);
        for (int k = 0; k < Values::parts; ++k) {
          lanes[j + k] = at::vec::clamp_min(u.part[k], lanes[j + k]);
        }
      }
    }
    for (; i < count; i += Values::size) {
      const Values u = logits_at(logits + i, std::min(Values::size, count - i));
      for (int k = 0; k < Values::parts; ++k) {
        lanes[k] = at::vec::clamp_min(u.part[k], lanes[k]);
      }
    }
    return horizontal_max(at::vec::maximum(lanes[0], lanes[1]));
  }

  struct Sums {
    Vec sum;
    Vec maximum;
  };

  // exp(u - shift) of a block into `out`; their sums by lane, and the largest logit where it is above `shift`.
  Sums exponentiate(const scalar_t* logits, int64_t count, acc_t shift, acc_t* out) const {
    // Not in the result itself, which the compiler would have to keep in memory: `out` might point to it.
    std::array<Vec, 2> sum{Vec(acc_t(0)), Vec(acc_t(0))};
    std::array<Vec, 2> maxima{Vec(shift), Vec(shift)};
    const auto step = [&](int64_t i, int64_t n, int first) {
      const Values u = logits_at(logits + i, n);
      for (int k = 0; k < Values::parts; ++k) {
        maxima[first + k] = at::vec::clamp_min(u.part[k], maxima[first + k]);
        const Vec e = exp_bounded(u.part[k] - Vec(shift));
        e.store(out + i + k * Vec::size());
        sum[first + k] = sum[first + k] + e;
      }
    };
    int64_t i = 0;
    for (; i + 2 * Vec::size() <= count; i += 2 * Vec::size()) {
      for (int j = 0; j < 2; j += Values::parts) {
        // The block after this one, in this row or the next, is fetched while there is work to do.
        __builtin_prefetch(logits + i + j * Vec::size() + kBlock);
        step(i + j * Vec::size(), Values::size, j);
      }
    }
    for (; i < count; i += Values::size) {
      step(i, std::min(Values::size, count - i), 0);
    }
    return {sum[0] + sum[1], at::vec::maximum(maxima[0], maxima[1])};
  }

  // One read of a row. The shift of a block is the largest logit so far; a block that has a larger one, of
  // which there are few, is done again.
  Normalizer normalize(const scalar_t* logits, const scalar_t* probabilities, acc_t pivot) {
    acc_t maximum = block_maximum(logits, std::min(kBlock, args_.classes));
    Vec sum(acc_t(0)), soft_sum(acc_t(0)), offset(acc_t(0));

    for (int64_t start = 0; start < args_.classes; start += kBlock) {
      const int64_t count = std::min(kBlock, args_.classes - start);
      acc_t* out = exponentials_.data() + (args_.gradient == nullptr ? 0 : start);
      Sums block = exponentiate(logits + start, count, maximum, out);
      if (const acc_t raised = horizontal_max(block.maximum); raised > maximum) {
        sum = sum * Vec(std::exp(maximum - raised));
        maximum = raised;
        block = exponentiate(logits + start, count, maximum, out);
      }
      shifts_[start / kBlock] = maximum;
      sum = sum + block.sum;

      if (has_soft()) {
        // Sums of a block before those of the row: long chains of additions lose digits.
        std::array<Vec, 2> weights{Vec(acc_t(0)), Vec(acc_t(0))};
        std::array<Vec, 2> distances{Vec(acc_t(0)), Vec(acc_t(0))};
        for (int64_t i = 0; i < count; i += Values::size) {
          const int64_t n = std::min(Values::size, count - i);
          const Values u = logits_at(logits + start + i, n);
          const Values soft = soft_at(probabilities, start + i, n);
          for (int k = 0; k < Values::parts; ++k) {
            const int64_t lanes = std::clamp<int64_t>(n - k * Vec::size(), 0, Vec::size());
            const int chain = static_cast<int>((i / Vec::size() + k) % 2);
            // Beyond the end 0 times infinity must not make NaN.
            const Vec distance = Vec::set(Vec(acc_t(0)), Vec(pivot) - u.part[k], lanes);
            weights[chain] = weights[chain] + soft.part[k];
            distances[chain] = at::vec::fmadd(soft.part[k], distance, distances[chain]);
          }
        }
        soft_sum = soft_sum + (weights[0] + weights[1]);
        offset = offset + (distances[0] + distances[1]);
      }
    }
    const acc_t soft_total = args_.probabilities == nullptr ? smooth_sum_ : horizontal_sum(soft_sum);
    return {maximum, horizontal_sum(sum), soft_total, horizontal_sum(offset)};
  }

  // gradient = (exp(u - maximum) * factor - scale * soft) du/dz
  void write_gradient(
      const scalar_t* logits, const scalar_t* probabilities, scalar_t* gradient, acc_t maximum, acc_t factor) const {
    for (int64_t start = 0; start < args_.classes; start += kBlock) {
      const int64_t end = std::min(start + kBlock, args_.classes);
      const Vec block_factor(factor * std::exp(shifts_[start / kBlock] - maximum));
      const auto value_at = [&](int64_t c, int64_t n) {
        Values value;
        for (int k = 0; k < Values::parts; ++k) {
          value.part[k] = Vec::loadu(exponentials_.data() + c + k * Vec::size()) * block_factor;
        }
        if constexpr (extras) {
          if (has_soft()) {
            const Values soft = soft_at(probabilities, c, n);
            for (int k = 0; k < Values::parts; ++k) {
              value.part[k] = value.part[k] - Vec(args_.gradient_scale) * soft.part[k];
            }
          }
          if (args_.softcap != 0) {
            const Values u = logits_at(logits + c, n);
            for (int k = 0; k < Values::parts; ++k) {
              value.part[k] = value.part[k] * cap_slope(u.part[k], args_.softcap);
            }
          }
        }
        return value.packed();
      };
      constexpr int64_t size = Values::size;
      int64_t c = start;
      if (streamed_) {
        const int64_t misaligned = reinterpret_cast<uintptr_t>(gradient + c) / sizeof(scalar_t) % size;
        if (misaligned != 0) {
          const int64_t head = std::min(size - misaligned, end - c);
          value_at(c, head).store(gradient + c, static_cast<int>(head));
          c += head;
        }
        for (; c + size <= end; c += size) {
          stream(value_at(c, size), gradient + c);
        }
      } else {
        for (; c + size <= end; c += size) {
          value_at(c, size).store(gradient + c);
        }
      }
      if (c < end) {
        value_at(c, end - c).store(gradient + c, static_cast<int>(end - c));
      }
    }
  }

  const CrossEntropyRows<scalar_t>& args_;
  const bool streamed_;
  std::vector<acc_t> exponentials_;
  std::vector<acc_t> shifts_;  // of each block
  acc_t smooth_sum_ = 0;       // the soft targets of a row without probabilities
};

}  // namespace lightkit::cpu
