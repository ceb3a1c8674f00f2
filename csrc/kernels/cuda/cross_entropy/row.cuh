// The arithmetic of one row of a cross-entropy. ../../cpu/cross_entropy/cross_entropy.h has the formulas.
#pragma once

#include "../common/dtype.cuh"
#include "cross_entropy.h"

#include <cmath>

namespace lightkit::cuda::cross_entropy {

// Returns 2^x in one instruction. Subnormal results become 0.
__device__ __forceinline__ float approximate_exp2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// The caller subtracts the row's maximum first: this rounds at the size of the differences of logits. To fold the
// subtraction into the multiplication by log2(e) would save an addition and round at the size of the logits.
__device__ __forceinline__ float fast_exp(float x) {
  return approximate_exp2(x * 1.4426950408889634f);
}
__device__ __forceinline__ double fast_exp(double x) {
  return exp(x);
}

template <typename acc_t>
__device__ __forceinline__ acc_t lowest() {
  return sizeof(acc_t) == sizeof(float) ? acc_t(-3.402823466e+38f) : acc_t(-1.7976931348623157e+308);
}

// Sums over some of a row's logits u. A merge gives the same bits whichever side is merged into the other.
template <typename acc_t>
struct Normalizer {
  acc_t maximum;
  acc_t sum;       // of exp(u - maximum)
  acc_t soft_sum;  // of the soft targets
  acc_t offset;    // of soft * (pivot - u)

  static __device__ __forceinline__ Normalizer none() {
    return {lowest<acc_t>(), acc_t(0), acc_t(0), acc_t(0)};
  }

  __device__ __forceinline__ void merge(const Normalizer& other) {
    const bool below = maximum < other.maximum;
    const acc_t high = below ? other.maximum : maximum;
    const acc_t low = below ? maximum : other.maximum;
    sum = (below ? other.sum : sum) + (below ? sum : other.sum) * fast_exp(low - high);
    maximum = high;
    soft_sum += other.soft_sum;
    offset += other.offset;
  }
};

// One row. `plain` leaves out probabilities, label smoothing and softcap at compile time.
template <typename scalar_t, bool plain>
struct Row {
  using acc_t = accumulator_t<scalar_t>;

  const Rows& args;
  const int64_t index;
  bool counts;          // the row exists and is not ignored
  int64_t target = -1;  // -1 for none
  acc_t u_target = 0;
  acc_t pivot = 0;
  acc_t scale = 1;  // of the gradient
  acc_t maximum = 0;
  acc_t factor = 0;     // of exp(u - maximum) in the gradient
  acc_t at_target = 0;  // the gradient at the target

  // `logits` [classes] of the row are read only if the row counts.
  __device__ __forceinline__ Row(const Rows& args, int64_t index, const scalar_t* logits)
      : args(args), index(index), counts(index < args.rows) {
    if (counts && by_index()) {
      target = args.target[index];
      counts = target != args.ignore_index;
      if (counts) {
        u_target = capped(widen<acc_t>(logits[target]));
        pivot = isfinite(u_target) ? u_target : acc_t(0);
      }
    }
  }

  __device__ __forceinline__ bool by_index() const {
    return plain || args.target != nullptr;
  }
  __device__ __forceinline__ bool has_soft() const {
    return !plain && (!by_index() || args.smoothing > 0);
  }
  __device__ __forceinline__ acc_t confidence() const {
    return static_cast<acc_t>(1 - args.smoothing);
  }
  __device__ __forceinline__ acc_t softcap() const {
    return plain ? acc_t(0) : static_cast<acc_t>(args.softcap);
  }

  __device__ __forceinline__ acc_t weight(int64_t c) const {
    return args.weight == nullptr ? acc_t(1) : static_cast<const acc_t*>(args.weight)[c];
  }

  __device__ __forceinline__ acc_t capped(acc_t z) const {
    return softcap() == acc_t(0) ? z : softcap() * tanh(z / softcap());
  }

  // du/dz at the capped logit u.
  __device__ __forceinline__ acc_t cap_slope(acc_t u) const {
    return softcap() == acc_t(0) ? acc_t(1) : acc_t(1) - (u / softcap()) * (u / softcap());
  }

  // The soft target of class c.
  __device__ __forceinline__ acc_t soft(int64_t c) const {
    acc_t value = static_cast<acc_t>(args.smoothing / static_cast<double>(args.classes));
    if (!by_index()) {
      const auto* probabilities = static_cast<const scalar_t*>(args.probabilities) + index * args.classes;
      value += confidence() * widen<acc_t>(probabilities[c]);
    }
    return weight(c) * value;
  }

  // Adds logit `z` of class `c` to `local`, whose maximum is at least the capped `z`.
  __device__ __forceinline__ void absorb(acc_t z, int64_t c, Normalizer<acc_t>& local) const {
    const acc_t u = capped(z);
    local.sum += fast_exp(u - local.maximum);
    if (has_soft()) {
      const acc_t s = soft(c);
      local.soft_sum += s;
      local.offset += s * (pivot - u);
    }
  }

  // Raises the maximum of `local` to the capped `z`, if that is larger. The cap is monotonic.
  __device__ __forceinline__ void raise(acc_t z, Normalizer<acc_t>& local) const {
    const acc_t raised = fmax(local.maximum, capped(z));
    local.sum *= fast_exp(local.maximum - raised);
    local.maximum = raised;
  }

  // Prepares `gradient` from the normalizer of the whole row. With `writes` it writes the loss and lse.
  __device__ __forceinline__ void finish(const Normalizer<acc_t>& norm, bool writes) {
    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const acc_t sum = norm.sum > acc_t(0) ? norm.sum : static_cast<acc_t>(NAN);
    const acc_t log_sum = log(sum);
    const acc_t lse = log_sum + norm.maximum;
    const acc_t hard = counts && by_index() ? confidence() * weight(target) : acc_t(0);
    const acc_t negative_log_p = log_sum + (norm.maximum - u_target);
    const auto z_loss = static_cast<acc_t>(args.z_loss);
    if (writes) {
      acc_t loss = z_loss == acc_t(0) ? acc_t(0) : z_loss * lse * lse;
      if (by_index()) {
        loss += hard * negative_log_p;
      }
      if (has_soft()) {
        loss += norm.soft_sum * (log_sum + (norm.maximum - pivot)) + norm.offset;
      }
      static_cast<acc_t*>(args.losses)[index] = counts ? loss : acc_t(0);
      if (args.lse != nullptr) {
        static_cast<acc_t*>(args.lse)[index] = counts ? lse : acc_t(0);
      }
    }
    if (counts && args.gradient != nullptr) {
      const acc_t rest = norm.soft_sum + acc_t(2) * z_loss * lse;
      maximum = norm.maximum;
      factor = scale * (hard + rest) / sum;
      if (by_index()) {
        // p - 1 is computed as expm1(log p), so that a confident row keeps its relative accuracy; it is rounded once.
        const acc_t less = has_soft() ? rest - soft(target) : rest;
        at_target = scale * ((hard + rest) * expm1(-negative_log_p) + less) * cap_slope(u_target);
      }
    }
  }

  // Returns the gradient of class `c`, not the target, with logit `z`, in a row that counts.
  __device__ __forceinline__ scalar_t gradient(acc_t z, int64_t c) const {
    const acc_t u = capped(z);
    acc_t value = fast_exp(u - maximum) * factor;
    if (has_soft()) {
      value -= scale * soft(c);
    }
    return narrow<scalar_t>(value * cap_slope(u));
  }
};

}  // namespace lightkit::cuda::cross_entropy
