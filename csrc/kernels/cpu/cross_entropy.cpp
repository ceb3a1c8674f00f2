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

// A wide row is walked in blocks that stay in the first-level cache between their two uses.
constexpr int64_t kBlock = 1024;

// A thread is woken for at least this many logits.
constexpr int64_t kGrain = 8192;

template <typename acc_t>
struct SoftmaxNormalizer {
  acc_t maximum;
  acc_t sum;            // of exp(z - maximum)
  acc_t smooth_offset;  // sum of smooth * (pivot - z)
};

template <typename acc_t>
acc_t horizontal_sum(const Vectorized<acc_t>& v) {
  return at::vec::vec_reduce_all<acc_t>([](const auto& a, const auto& b) { return a + b; }, v);
}

template <typename acc_t>
acc_t horizontal_max(const Vectorized<acc_t>& v) {
  return at::vec::vec_reduce_all<acc_t>([](const auto& a, const auto& b) { return at::vec::maximum(a, b); }, v);
}

// Maximum of a block, starting from `maximum`. NaN may or may not come through: the sum is what carries it.
template <typename acc_t>
acc_t block_maximum(const acc_t* z, int64_t count, acc_t maximum) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t width = Vec::size();
  std::array<Vec, 4> lanes;
  lanes.fill(Vec(maximum));
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    for (int k = 0; k < 4; ++k) {
      lanes[k] = at::vec::clamp_min(Vec::loadu(z + i + k * width), lanes[k]);
    }
  }
  for (; i + width <= count; i += width) {
    lanes[0] = at::vec::clamp_min(Vec::loadu(z + i), lanes[0]);
  }
  for (; i < count; ++i) {
    maximum = std::max(maximum, z[i]);
  }
  const Vec all = at::vec::maximum(at::vec::maximum(lanes[0], lanes[1]), at::vec::maximum(lanes[2], lanes[3]));
  return std::max(maximum, horizontal_max(all));
}

// One read of a row: the maximum is followed block by block, and the sum rescaled when it rises.
template <typename scalar_t>
SoftmaxNormalizer<accumulator_t<scalar_t>> normalize_row(
    const scalar_t* row,
    int64_t classes,
    const accumulator_t<scalar_t>* smooth,
    accumulator_t<scalar_t> pivot) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int64_t width = Vec::size();
  alignas(64) acc_t buffer[kBlock];

  // The lowest finite number rather than -inf: -inf - -inf would make NaN of a block of -inf.
  acc_t maximum = std::numeric_limits<acc_t>::lowest();
  acc_t tail_sum = 0;
  std::array<Vec, 4> sums;
  sums.fill(Vec(acc_t(0)));
  Vec offset(acc_t(0));
  acc_t tail_offset = 0;

  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t count = std::min(kBlock, classes - start);
    const acc_t* z = as_accumulators(row + start, count, buffer);

    const acc_t raised = block_maximum(z, count, maximum);
    if (raised > maximum) {
      const acc_t rescale = std::exp(maximum - raised);
      for (auto& sum : sums) {
        sum = sum * Vec(rescale);
      }
      tail_sum *= rescale;
      maximum = raised;
    }

    const Vec shift(maximum);
    int64_t i = 0;
    for (; i + 4 * width <= count; i += 4 * width) {
      for (int k = 0; k < 4; ++k) {
        sums[k] = sums[k] + exp_nonpositive(Vec::loadu(z + i + k * width) - shift);
      }
    }
    for (; i + width <= count; i += width) {
      sums[0] = sums[0] + exp_nonpositive(Vec::loadu(z + i) - shift);
    }
    for (; i < count; ++i) {
      tail_sum += std::exp(z[i] - maximum);
    }

    if (smooth != nullptr) {
      const acc_t* s = smooth + start;
      for (i = 0; i + width <= count; i += width) {
        offset = at::vec::fmadd(Vec::loadu(s + i), Vec(pivot) - Vec::loadu(z + i), offset);
      }
      for (; i < count; ++i) {
        tail_offset += s[i] * (pivot - z[i]);
      }
    }
  }
  const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return {maximum, horizontal_sum(sum) + tail_sum, horizontal_sum(offset) + tail_offset};
}

// gradient = exp(z - maximum) * factor - scale * smooth
template <typename scalar_t>
void write_gradient(
    const scalar_t* row,
    scalar_t* gradient,
    int64_t classes,
    accumulator_t<scalar_t> maximum,
    accumulator_t<scalar_t> factor,
    const accumulator_t<scalar_t>* smooth,
    accumulator_t<scalar_t> scale) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int64_t width = Vec::size();
  alignas(64) acc_t buffer[kBlock];

  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t count = std::min(kBlock, classes - start);
    const acc_t* z = as_accumulators(row + start, count, buffer);
    acc_t* out;
    if constexpr (is_half<scalar_t>) {
      out = buffer;
    } else {
      out = gradient + start;
    }
    int64_t i = 0;
    for (; i + width <= count; i += width) {
      Vec value = exp_nonpositive(Vec::loadu(z + i) - Vec(maximum)) * Vec(factor);
      if (smooth != nullptr) {
        value = value - Vec(scale) * Vec::loadu(smooth + start + i);
      }
      value.store(out + i);
    }
    for (; i < count; ++i) {
      out[i] = std::exp(z[i] - maximum) * factor;
      if (smooth != nullptr) {
        out[i] -= scale * smooth[start + i];
      }
    }
    if constexpr (is_half<scalar_t>) {
      at::vec::convert(buffer, gradient + start, count);
    }
  }
}

template <typename scalar_t>
void wide_rows(const CrossEntropyRows<scalar_t>& args, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  for (int64_t r = begin; r < end; ++r) {
    const scalar_t* row = args.logits + r * args.classes;
    scalar_t* gradient = args.gradient == nullptr ? nullptr : args.gradient + r * args.classes;
    const int64_t target = args.target[r];
    if (target == args.ignore_index) {
      args.losses[r] = 0;
      if (gradient != nullptr) {
        std::fill_n(gradient, args.classes, scalar_t(0));
      }
      continue;
    }

    const acc_t z_target = static_cast<acc_t>(row[target]);
    // Differences from the target's logit keep the smoothing sum accurate for logits far from 0.
    const acc_t pivot = std::isfinite(z_target) ? z_target : acc_t(0);
    const auto row_norm = normalize_row(row, args.classes, args.smooth, pivot);
    const acc_t log_sum = std::log(row_norm.sum);
    const acc_t target_weight = args.confidence * (args.weight == nullptr ? acc_t(1) : args.weight[target]);

    // lse - z_target as log(sum) + (max - z_target): the large parts cancel exactly.
    const acc_t negative_log_p = log_sum + (row_norm.maximum - z_target);
    acc_t loss = target_weight * negative_log_p;
    if (args.smooth != nullptr) {
      loss += args.smooth_sum * (log_sum + (row_norm.maximum - pivot)) + row_norm.smooth_offset;
    }
    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const bool undefined = !(row_norm.sum > 0);
    args.losses[r] = undefined ? std::numeric_limits<acc_t>::quiet_NaN() : loss;
    if (gradient == nullptr) {
      continue;
    }

    const acc_t total = target_weight + args.smooth_sum;
    const acc_t scale = args.gradient_scale;
    const acc_t factor =
        undefined ? std::numeric_limits<acc_t>::quiet_NaN() : scale * total / row_norm.sum;
    write_gradient(row, gradient, args.classes, row_norm.maximum, factor, args.smooth, scale);
    // p - 1 as expm1(log p), so that a confident row keeps its relative accuracy; rounded once.
    const acc_t smooth_target = args.smooth == nullptr ? acc_t(0) : args.smooth[target];
    gradient[target] = static_cast<scalar_t>(
        scale * (total * std::expm1(-negative_log_p) + (args.smooth_sum - smooth_target)));
  }
}

// As many rows as the vector has lanes, transposed so that a class of all of them is one vector.
template <typename scalar_t>
void narrow_rows(const CrossEntropyRows<scalar_t>& args, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int64_t lanes = Vec::size();
  const int64_t classes = args.classes;
  alignas(64) acc_t rows_buffer[kNarrowClasses * lanes];
  alignas(64) acc_t logits[kNarrowClasses * lanes] = {};
  alignas(64) acc_t exps[kNarrowClasses * lanes];
  alignas(64) acc_t log_sums[lanes], maxima[lanes], offsets[lanes], factors[lanes] = {}, log_p[lanes] = {};
  int64_t targets[lanes];
  acc_t target_weights[lanes];

  for (int64_t r = begin; r < end; r += lanes) {
    const int count = static_cast<int>(std::min(lanes, end - r));
    const acc_t* source = as_accumulators(args.logits + r * classes, count * classes, rows_buffer);
    at::vec::transpose_mxn<acc_t>(source, classes, logits, lanes, count, static_cast<int>(classes));

    Vec maximum = Vec::loadu(logits);
    for (int64_t c = 1; c < classes; ++c) {
      maximum = at::vec::clamp_min(Vec::loadu(logits + c * lanes), maximum);
    }
    Vec sum(acc_t(0));
    Vec offset(acc_t(0));
    for (int64_t c = 0; c < classes; ++c) {
      const Vec shifted = Vec::loadu(logits + c * lanes) - maximum;
      const Vec e = exp_nonpositive(shifted);
      sum = sum + e;
      e.store(exps + c * lanes);
      if (args.smooth != nullptr) {
        offset = offset - Vec(args.smooth[c]) * shifted;
      }
    }
    sum.log().store(log_sums);
    maximum.store(maxima);
    offset.store(offsets);

    for (int k = 0; k < count; ++k) {
      const int64_t target = args.target[r + k];
      const bool ignored = target == args.ignore_index;
      targets[k] = ignored ? -1 : target;
      if (ignored) {
        args.losses[r + k] = 0;
        target_weights[k] = log_p[k] = 0;
        continue;
      }
      target_weights[k] = args.confidence * (args.weight == nullptr ? acc_t(1) : args.weight[target]);
      const acc_t negative_log_p = log_sums[k] + (maxima[k] - logits[target * lanes + k]);
      acc_t loss = target_weights[k] * negative_log_p;
      if (args.smooth != nullptr) {
        loss += args.smooth_sum * log_sums[k] + offsets[k];
      }
      args.losses[r + k] = loss;
      log_p[k] = -negative_log_p;
    }
    if (args.gradient == nullptr) {
      continue;
    }

    for (int k = 0; k < count; ++k) {
      factors[k] = args.gradient_scale * (target_weights[k] + args.smooth_sum);
    }
    const Vec scale(args.gradient_scale);
    const Vec factor = Vec::loadu(factors) / sum;
    for (int64_t c = 0; c < classes; ++c) {
      Vec value = Vec::loadu(exps + c * lanes) * factor;
      if (args.smooth != nullptr) {
        value = value - scale * Vec(args.smooth[c]);
      }
      value.store(exps + c * lanes);
    }
    Vec::loadu(log_p).expm1().store(log_p);
    for (int k = 0; k < count; ++k) {
      if (targets[k] < 0) {
        continue;
      }
      const acc_t smooth_target = args.smooth == nullptr ? acc_t(0) : args.smooth[targets[k]];
      exps[targets[k] * lanes + k] =
          factors[k] * log_p[k] + args.gradient_scale * (args.smooth_sum - smooth_target);
    }

    scalar_t* gradient = args.gradient + r * classes;
    if constexpr (is_half<scalar_t>) {
      at::vec::transpose_mxn<acc_t>(exps, lanes, rows_buffer, classes, static_cast<int>(classes), count);
      at::vec::convert(rows_buffer, gradient, count * classes);
    } else {
      at::vec::transpose_mxn<acc_t>(exps, lanes, gradient, classes, static_cast<int>(classes), count);
    }
    for (int k = 0; k < count; ++k) {
      if (targets[k] < 0) {
        std::fill_n(gradient + k * classes, classes, scalar_t(0));
      }
    }
  }
}

}  // namespace

template <typename scalar_t>
void cross_entropy(const CrossEntropyRows<scalar_t>& args) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.classes));
  at::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
    if (args.classes <= kNarrowClasses) {
      narrow_rows(args, begin, end);
    } else {
      wide_rows(args, begin, end);
    }
  });
}

template void cross_entropy(const CrossEntropyRows<float>&);
template void cross_entropy(const CrossEntropyRows<double>&);
template void cross_entropy(const CrossEntropyRows<at::BFloat16>&);
template void cross_entropy(const CrossEntropyRows<at::Half>&);

}  // namespace lightkit::cpu
