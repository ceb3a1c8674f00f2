#include "cross_entropy.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace lightkit::cpu {
namespace {

using at::vec::Vectorized;

// Up to this many classes a row does not fill the vector unit, and rows are worked on side by side.
constexpr int64_t kNarrowClasses = 64;
static_assert(kNarrowClasses <= kMaxStridedClasses);

// A wide row is walked in blocks that stay in the first-level cache between their two uses.
constexpr int64_t kBlock = 1024;

// A thread is woken for at least this many logits.
constexpr int64_t kGrain = 8192;

template <typename acc_t>
acc_t horizontal_sum(const Vectorized<acc_t>& v) {
  return at::vec::vec_reduce_all<acc_t>([](const auto& a, const auto& b) { return a + b; }, v);
}

template <typename acc_t>
acc_t horizontal_max(const Vectorized<acc_t>& v) {
  return at::vec::vec_reduce_all<acc_t>([](const auto& a, const auto& b) { return at::vec::maximum(a, b); }, v);
}

// Calls f(i, n) for the whole vectors of a block and, with n < width, for what is left at its end.
template <typename acc_t, typename F>
void for_each_vector(int64_t count, const F& f) {
  constexpr int64_t width = Vectorized<acc_t>::size();
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    f(i, width);
  }
  if (i < count) {
    f(i, count - i);
  }
}

// The first `count` lanes of a vector from memory, the others `fill`.
template <typename acc_t>
Vectorized<acc_t> load(const acc_t* data, int64_t count, acc_t fill) {
  using Vec = Vectorized<acc_t>;
  return count == Vec::size() ? Vec::loadu(data) : Vec::set(Vec(fill), Vec::loadu(data, count), count);
}

template <typename acc_t>
Vectorized<acc_t> capped(const Vectorized<acc_t>& z, acc_t softcap) {
  return Vectorized<acc_t>(softcap) * (z / Vectorized<acc_t>(softcap)).tanh();
}

template <typename acc_t>
acc_t capped(acc_t z, acc_t softcap) {
  return softcap == 0 ? z : softcap * std::tanh(z / softcap);
}

// du/dz where u is the capped logit.
template <typename value_t, typename acc_t>
value_t cap_slope(const value_t& u, acc_t softcap) {
  const value_t ratio = u / value_t(softcap);
  return value_t(acc_t(1)) - ratio * ratio;
}

// One row of the wide path: hands out its blocks as accumulators, with the softcap and the soft targets done.
template <typename scalar_t>
class Row {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;

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
  using Vec = Vectorized<acc_t>;
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
  using Vec = Vectorized<acc_t>;
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
  using Vec = Vectorized<acc_t>;
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

// As many rows as a vector has lanes, side by side: a class of all of them is one vector. Rows that lie one
// after the other are transposed on the way in and out; with inner > 1 they lie side by side already.
template <typename scalar_t>
class Tile {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  explicit Tile(const CrossEntropyRows<scalar_t>& args)
      : args_(args), positions_(positions(args)), tiles_((positions_ + kLanes - 1) / kLanes) {
    // A last tile fills some lanes only; the others must hold numbers of some kind.
    std::fill_n(logits_, args.classes * kLanes, acc_t(0));
    std::fill_n(soft_, args.classes * kLanes, acc_t(0));
  }

  // Tiles of all rows. With inner > 1 none reaches from one outer index into the next.
  static int64_t count(const CrossEntropyRows<scalar_t>& args) {
    return (positions(args) + kLanes - 1) / kLanes * (args.rows / positions(args));
  }

  void run(int64_t tile) {
    const int64_t outer = tile / tiles_;
    const int64_t position = tile % tiles_ * kLanes;
    const int rows = static_cast<int>(std::min(kLanes, positions_ - position));
    const int64_t first_row = outer * positions_ + position;
    const int64_t offset =
        args_.inner == 1 ? position * args_.classes : outer * args_.classes * args_.inner + position;

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
  static int64_t positions(const CrossEntropyRows<scalar_t>& args) {
    return args.inner == 1 ? args.rows : args.inner;
  }

  static Vec at(const acc_t* tile, int64_t c) {
    return Vec::loadu(tile + c * kLanes);
  }

  void read(const scalar_t* source, int rows, acc_t* tile) {
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

  void write(scalar_t* gradient, int rows) {
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

  // The soft target of a class in every row.
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

  // Losses, and what the gradient needs of each row. `results_` holds exp(u - maximum).
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
      const Vec e = exp_nonpositive(shifted);
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
    // What does not depend on the target: the soft part and z_loss lse^2.
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
    // p - 1 at the target as expm1(log p): see wide_rows.
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

  const CrossEntropyRows<scalar_t>& args_;
  const int64_t positions_;
  const int64_t tiles_;  // of one outer index
  alignas(64) acc_t logits_[kMaxStridedClasses * kLanes];
  alignas(64) acc_t soft_[kMaxStridedClasses * kLanes];
  alignas(64) acc_t results_[kMaxStridedClasses * kLanes];
  alignas(64) acc_t sums_[kLanes], lse_[kLanes], soft_sums_[kLanes], hard_[kLanes] = {}, log_p_[kLanes] = {};
  bool ignored_[kLanes];
};

}  // namespace

template <typename scalar_t>
void cross_entropy(const CrossEntropyRows<scalar_t>& args) {
  if (args.rows == 0 || args.classes == 0) {
    return;
  }
  if (args.inner > 1 || args.classes <= kNarrowClasses) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (args.classes * Tile<scalar_t>::kLanes));
    at::parallel_for(0, Tile<scalar_t>::count(args), grain, [&](int64_t begin, int64_t end) {
      Tile<scalar_t> tile(args);
      for (int64_t i = begin; i < end; ++i) {
        tile.run(i);
      }
    });
  } else {
    const int64_t grain = std::max<int64_t>(1, kGrain / args.classes);
    at::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) { wide_rows(args, begin, end); });
  }
}

template void cross_entropy(const CrossEntropyRows<float>&);
template void cross_entropy(const CrossEntropyRows<double>&);
template void cross_entropy(const CrossEntropyRows<at::BFloat16>&);
template void cross_entropy(const CrossEntropyRows<at::Half>&);

}  // namespace lightkit::cpu
