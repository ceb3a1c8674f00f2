// Cross-entropy of wide rows: one row at a time, in blocks.
//
// The first pass reads the logits, and writes exp(u - shift) of each block to a buffer that stays in the caches; the
// shift of a block is the largest logit so far. The second pass multiplies each block by the factor that turns its
// exponentials into gradients (online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018).
#pragma once

#include "../../common/ceil_div.h"
#include "../common/softcap.h"
#include "cross_entropy.h"
#include "tuning.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace lightkit::cpu::cross_entropy {

// Sums in double, with an error that grows with the logarithm of the count: equal values round the same way.
template <typename acc_t>
double pairwise_sum(const acc_t* values, int64_t count) {  // [count]
  if (count <= 16) {
    return std::accumulate(values, values + count, 0.0);
  }
  return pairwise_sum(values, count / 2) + pairwise_sum(values + count / 2, count - count / 2);
}

// Works on the rows of one thread. Without `extras` there is neither a softcap nor a soft target.
template <typename scalar_t, bool extras>
class WideRows {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  using Values = Pack<scalar_t>;

  explicit WideRows(const Rows<scalar_t>& args)
      : args_(args),
        streamed_(
            args.gradient != args.logits &&
            args.rows * args.classes * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamedBytes),
        // The last pack of a row is stored as a whole.
        exponentials_(
            ((args.gradient == nullptr ? std::min(kBlockClasses, args.classes) : args.classes) + Values::size)),
        shifts_(ceil_div(args.classes, kBlockClasses)) {
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
    // Differences from a pivot keep the soft part accurate for logits far from 0.
    const acc_t pivot = std::isfinite(u_target) ? u_target : acc_t(0);
    const Normalizer norm = normalize(logits, probabilities, pivot);
    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const acc_t sum = norm.sum > 0 ? norm.sum : std::numeric_limits<acc_t>::quiet_NaN();
    const acc_t log_sum = std::log(sum);
    const acc_t lse = log_sum + norm.maximum;
    const acc_t hard = args_.target == nullptr
        ? acc_t(0)
        : args_.confidence * (args_.weight == nullptr ? acc_t(1) : args_.weight[target]);

    // lse - u_target = log(sum) + (maximum - u_target): the large parts cancel exactly.
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
      // p - 1 is computed as expm1(log p), so that a confident row keeps its relative accuracy; it is rounded once.
      const acc_t soft_target = args_.smooth == nullptr ? acc_t(0) : args_.smooth[target];
      acc_t value = args_.gradient_scale * ((hard + rest) * std::expm1(-negative_log_p) + (rest - soft_target));
      if (args_.softcap != 0) {
        value *= cap_slope(u_target, args_.softcap);
      }
      gradient[target] = static_cast<scalar_t>(value);
    }
  }

  // Returns `count` capped logits. Missing lanes are -inf, which adds nothing to a sum of exponentials.
  Values logits_at(const scalar_t* logits, int64_t count) const {
    Values u = Values::load(logits, count, -std::numeric_limits<scalar_t>::infinity());
    if constexpr (extras) {
      if (args_.softcap != 0) {
        for (int k = 0; k < Values::parts; ++k) {
          const int64_t lanes = std::clamp<int64_t>(count - k * Vec::size(), 0, Vec::size());
          // The cap of -inf is finite.
          u.part[k] = Vec::set(Vec(-std::numeric_limits<acc_t>::infinity()), capped(u.part[k], args_.softcap), lanes);
        }
      }
    }
    return u;
  }

  // Returns the soft targets of `count` classes from `c` on. Missing lanes are 0.
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

  // Returns the largest logit of a block. It may lose a NaN; the sum of exponentials keeps it.
  acc_t block_maximum(const scalar_t* logits, int64_t count) const {
    // The lowest finite number: with -inf, -inf - -inf would make NaN of a block of -inf.
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

  // The sums and maxima of a block, by lane.
  struct Sums {
    Vec sum;
    Vec maximum;
  };

  // Writes exp(u - shift) of a block. Returns the sum by lane, and the maximum by lane of the logits and `shift`.
  Sums exponentiate(
      const scalar_t* logits,  // [count]
      int64_t count,
      acc_t shift,
      acc_t* out) const {  // [count, rounded up to a pack]
    // Not in a Sums: `out` might point to it, so that the compiler would keep it in memory.
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
        // Fetches the next block, of this row or the next one, during the arithmetic.
        __builtin_prefetch(logits + i + j * Vec::size() + kBlockClasses);
        step(i + j * Vec::size(), Values::size, j);
      }
    }
    for (; i < count; i += Values::size) {
      step(i, std::min(Values::size, count - i), 0);
    }
    return {sum[0] + sum[1], at::vec::maximum(maxima[0], maxima[1])};
  }

  // The first pass over a row. A block with a logit above its shift, of which there are few, is computed again.
  Normalizer normalize(const scalar_t* logits, const scalar_t* probabilities, acc_t pivot) {
    acc_t maximum = block_maximum(logits, std::min(kBlockClasses, args_.classes));
    Vec sum(acc_t(0)), soft_sum(acc_t(0)), offset(acc_t(0));

    for (int64_t start = 0; start < args_.classes; start += kBlockClasses) {
      const int64_t count = std::min(kBlockClasses, args_.classes - start);
      acc_t* out = exponentials_.data() + (args_.gradient == nullptr ? 0 : start);
      Sums block = exponentiate(logits + start, count, maximum, out);
      if (const acc_t raised = horizontal_max(block.maximum); raised > maximum) {
        sum = sum * Vec(std::exp(maximum - raised));
        maximum = raised;
        block = exponentiate(logits + start, count, maximum, out);
      }
      shifts_[start / kBlockClasses] = maximum;
      sum = sum + block.sum;

      if (has_soft()) {
        // A block is summed first: long chains of additions lose digits.
        std::array<Vec, 2> weights{Vec(acc_t(0)), Vec(acc_t(0))};
        std::array<Vec, 2> distances{Vec(acc_t(0)), Vec(acc_t(0))};
        for (int64_t i = 0; i < count; i += Values::size) {
          const int64_t n = std::min(Values::size, count - i);
          const Values u = logits_at(logits + start + i, n);
          const Values soft = soft_at(probabilities, start + i, n);
          for (int k = 0; k < Values::parts; ++k) {
            const int64_t lanes = std::clamp<int64_t>(n - k * Vec::size(), 0, Vec::size());
            const int chain = static_cast<int>((i / Vec::size() + k) % 2);
            // Beyond the end, 0 times infinity must not make NaN.
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

  // The second pass: gradient = (exp(u - maximum) * factor - scale * soft) du/dz.
  void write_gradient(
      const scalar_t* logits,         // [classes]
      const scalar_t* probabilities,  // [classes], or null
      scalar_t* gradient,             // [classes]
      acc_t maximum,
      acc_t factor) const {
    for (int64_t start = 0; start < args_.classes; start += kBlockClasses) {
      const int64_t end = std::min(start + kBlockClasses, args_.classes);
      const Vec block_factor(factor * std::exp(shifts_[start / kBlockClasses] - maximum));
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

  const Rows<scalar_t>& args_;
  const bool streamed_;
  std::vector<acc_t> exponentials_;  // [classes], or of one block if no gradient is wanted
  std::vector<acc_t> shifts_;        // [blocks]
  acc_t smooth_sum_ = 0;             // of the soft targets of a row without probabilities
};

}  // namespace lightkit::cpu::cross_entropy
