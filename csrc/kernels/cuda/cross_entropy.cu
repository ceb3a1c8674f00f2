#include "cross_entropy.h"

#include "dtype.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace lightkit::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kMaxRowThreads = 256;
constexpr unsigned kFullMask = 0xffffffffu;

// A row is kept in registers if its share of a thread is at most this many packs.
constexpr int kHeldPacks = 8;

// exp(x) as exp2(x log2 e), which the device has in hardware.
template <typename acc_t>
__device__ __forceinline__ acc_t fast_exp(acc_t x) {
  if constexpr (sizeof(acc_t) == sizeof(float)) {
    return exp2f(x * 1.4426950408889634f);
  } else {
    return exp(x);
  }
}

template <typename acc_t>
__device__ __forceinline__ acc_t lowest() {
  return sizeof(acc_t) == sizeof(float) ? acc_t(-3.402823466e+38f) : acc_t(-1.7976931348623157e+308);
}

// The running maximum, the sum of exp(u - maximum), that of the soft targets, and that of soft * (pivot - u).
template <typename acc_t>
struct Normalizer {
  acc_t maximum;
  acc_t sum;
  acc_t soft_sum;
  acc_t offset;

  __device__ __forceinline__ void merge(const Normalizer& other) {
    const acc_t raised = fmax(maximum, other.maximum);
    sum = sum * fast_exp(maximum - raised) + other.sum * fast_exp(other.maximum - raised);
    maximum = raised;
    soft_sum += other.soft_sum;
    offset += other.offset;
  }
};

template <typename acc_t>
__device__ __forceinline__ acc_t capped(acc_t z, acc_t softcap) {
  return softcap == acc_t(0) ? z : softcap * tanh(z / softcap);
}

// du/dz where u is the capped logit.
template <typename acc_t>
__device__ __forceinline__ acc_t cap_slope(acc_t u, acc_t softcap) {
  return softcap == acc_t(0) ? acc_t(1) : acc_t(1) - (u / softcap) * (u / softcap);
}

// Merges the normalizers of the `threads` threads that share a row, in an order fixed by their number. All of
// them get the result. `scratch` holds one entry a warp of the block.
template <typename acc_t>
__device__ Normalizer<acc_t> reduce_row(Normalizer<acc_t> value, int threads, Normalizer<acc_t>* scratch) {
  const int width = threads < 32 ? threads : 32;
  for (int offset = width / 2; offset > 0; offset /= 2) {
    Normalizer<acc_t> other;
    other.maximum = __shfl_xor_sync(kFullMask, value.maximum, offset, width);
    other.sum = __shfl_xor_sync(kFullMask, value.sum, offset, width);
    other.soft_sum = __shfl_xor_sync(kFullMask, value.soft_sum, offset, width);
    other.offset = __shfl_xor_sync(kFullMask, value.offset, offset, width);
    value.merge(other);
  }
  if (threads <= 32) {
    return value;
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warps = threads / 32;
  const int first_warp = threadIdx.y * warps;
  __syncthreads();
  if (thread % 32 == 0) {
    scratch[thread / 32] = value;
  }
  __syncthreads();
  value = scratch[first_warp];
  for (int warp = 1; warp < warps; ++warp) {
    value.merge(scratch[first_warp + warp]);
  }
  return value;
}

// blockDim = (threads a row, rows a block). With `packed`, rows start on 16-byte boundaries and hold whole
// packs; with `held` too, a row is read from memory once and kept in registers for the gradient.
template <typename scalar_t, bool packed, bool held>
__global__ void __launch_bounds__(kMaxRowThreads) rows_kernel(CrossEntropyRows args) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int width = packed ? Pack<scalar_t>::size : 1;
  __shared__ Normalizer<acc_t> scratch[kMaxRowThreads / 32];

  const auto* weight = static_cast<const acc_t*>(args.weight);
  const auto* smooth = static_cast<const acc_t*>(args.smooth);
  auto* losses = static_cast<acc_t*>(args.losses);
  const auto confidence = static_cast<acc_t>(args.confidence);
  const auto z_loss = static_cast<acc_t>(args.z_loss);
  const auto softcap = static_cast<acc_t>(args.softcap);
  const bool by_index = args.target != nullptr;
  const bool has_soft = !by_index || smooth != nullptr;
  const acc_t scale = args.mean ? static_cast<acc_t>(1.0 / *args.denominator) : acc_t(1);
  const int64_t units = args.classes / width;

  // Every thread of a block takes part in every round: reduce_row synchronises.
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.rows; first += row_stride) {
    const int64_t row = first + threadIdx.y;
    const bool exists = row < args.rows;
    const int64_t target = exists && by_index ? args.target[row] : 0;
    const bool counts = exists && !(by_index && target == args.ignore_index);
    const int64_t offset = (exists ? row : 0) * args.classes;
    const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + offset;
    const scalar_t* probabilities = static_cast<const scalar_t*>(args.probabilities) + (by_index ? 0 : offset);
    const acc_t u_target = counts ? capped(widen<acc_t>(logits[target]), softcap) : acc_t(0);
    const acc_t pivot = isfinite(u_target) ? u_target : acc_t(0);
    const auto soft = [&](int64_t c) {
      acc_t value = smooth == nullptr ? acc_t(0) : smooth[c];
      if (!by_index) {
        value += confidence * (weight == nullptr ? acc_t(1) : weight[c]) * widen<acc_t>(probabilities[c]);
      }
      return value;
    };

    Normalizer<acc_t> local{lowest<acc_t>(), acc_t(0), acc_t(0), acc_t(0)};
    Pack<scalar_t> kept[held ? kHeldPacks : 1];
    const auto absorb = [&](const scalar_t* values, int64_t begin) {
      acc_t u[width];
      acc_t raised = local.maximum;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        u[k] = capped(widen<acc_t>(values[k]), softcap);
        raised = fmax(raised, u[k]);
      }
      local.sum *= fast_exp(local.maximum - raised);
      local.maximum = raised;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        local.sum += fast_exp(u[k] - raised);
        if (has_soft) {
          const acc_t s = soft(begin + k);
          local.soft_sum += s;
          local.offset += s * (pivot - u[k]);
        }
      }
    };
    if (counts) {
      if constexpr (held) {
#pragma unroll
        for (int p = 0; p < kHeldPacks; ++p) {
          const int64_t unit = threadIdx.x + static_cast<int64_t>(p) * blockDim.x;
          if (unit < units) {
            kept[p] = reinterpret_cast<const Pack<scalar_t>*>(logits)[unit];
            absorb(kept[p].values, unit * width);
          }
        }
      } else {
        for (int64_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
          if constexpr (packed) {
            const Pack<scalar_t> pack = reinterpret_cast<const Pack<scalar_t>*>(logits)[unit];
            absorb(pack.values, unit * width);
          } else {
            absorb(logits + unit, unit);
          }
        }
      }
    }
    const Normalizer<acc_t> norm = reduce_row(local, blockDim.x, scratch);
    if (!exists) {
      continue;
    }

    // The sum is 0 only where every logit is -inf, whose softmax is NaN.
    const acc_t sum = norm.sum > acc_t(0) ? norm.sum : static_cast<acc_t>(NAN);
    const acc_t log_sum = log(sum);
    const acc_t lse = log_sum + norm.maximum;
    const acc_t hard = counts && by_index ? confidence * (weight == nullptr ? acc_t(1) : weight[target]) : acc_t(0);
    const acc_t negative_log_p = log_sum + (norm.maximum - u_target);
    if (threadIdx.x == 0) {
      acc_t loss = z_loss == acc_t(0) ? acc_t(0) : z_loss * lse * lse;
      if (by_index) {
        loss += hard * negative_log_p;
      }
      if (has_soft) {
        loss += norm.soft_sum * (log_sum + (norm.maximum - pivot)) + norm.offset;
      }
      losses[row] = counts ? loss : acc_t(0);
      if (args.lse != nullptr) {
        static_cast<acc_t*>(args.lse)[row] = counts ? lse : acc_t(0);
      }
    }
    if (args.gradient == nullptr) {
      continue;
    }

    scalar_t* gradient = static_cast<scalar_t*>(args.gradient) + offset;
    const acc_t rest = norm.soft_sum + acc_t(2) * z_loss * lse;
    const acc_t factor = scale * (hard + rest) / sum;
    // p - 1 as expm1(log p), so that a confident row keeps its relative accuracy; rounded once.
    const acc_t at_target = counts && by_index
        ? scale * ((hard + rest) * expm1(-negative_log_p) + (rest - soft(target))) * cap_slope(u_target, softcap)
        : acc_t(0);
    const auto emit = [&](const scalar_t* values, int64_t begin, scalar_t* out) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        acc_t value = acc_t(0);
        if (counts) {
          const acc_t u = capped(widen<acc_t>(values[k]), softcap);
          value = fast_exp(u - norm.maximum) * factor;
          if (has_soft) {
            value -= scale * soft(begin + k);
          }
          value *= cap_slope(u, softcap);
          if (by_index && begin + k == target) {
            value = at_target;
          }
        }
        out[k] = narrow<scalar_t>(value);
      }
    };
    if constexpr (held) {
#pragma unroll
      for (int p = 0; p < kHeldPacks; ++p) {
        const int64_t unit = threadIdx.x + static_cast<int64_t>(p) * blockDim.x;
        if (unit < units) {
          Pack<scalar_t> out;
          emit(kept[p].values, unit * width, out.values);
          reinterpret_cast<Pack<scalar_t>*>(gradient)[unit] = out;
        }
      }
    } else {
      for (int64_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
        if constexpr (packed) {
          const Pack<scalar_t> pack = reinterpret_cast<const Pack<scalar_t>*>(logits)[unit];
          Pack<scalar_t> out;
          emit(pack.values, unit * width, out.values);
          reinterpret_cast<Pack<scalar_t>*>(gradient)[unit] = out;
        } else {
          const scalar_t value = logits[unit];
          emit(&value, unit, gradient + unit);
        }
      }
    }
  }
}

// Sum over a block in an order that does not depend on timing; every thread gets it.
__device__ double block_sum(double value) {
  __shared__ double partial[kBlockThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kFullMask, value, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kBlockThreads / 32; ++warp) {
    value += partial[warp];
  }
  return value;
}

// One block: checks every target, and sums what a mean divides by.
template <typename acc_t>
__global__ void prepare_kernel(CrossEntropyRows args) {
  const auto* weight = static_cast<const acc_t*>(args.weight);
  double counted = 0;
  for (int64_t row = threadIdx.x; args.target != nullptr && row < args.rows; row += kBlockThreads) {
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      continue;
    }
    if (target < 0 || target >= args.classes) {
      printf(
          "lightkit cross_entropy: Target %lld is out of bounds: row %lld must name one of the %lld classes or be "
          "ignore_index\n",
          static_cast<long long>(target),
          static_cast<long long>(row),
          static_cast<long long>(args.classes));
      __trap();
    }
    counted += weight == nullptr ? 1.0 : static_cast<double>(weight[target]);
  }
  counted = block_sum(counted);
  if (threadIdx.x == 0) {
    *args.denominator = args.target == nullptr ? static_cast<double>(args.rows) : counted;
  }
}

// One block: the sum, or the mean, of the losses.
template <typename acc_t>
__global__ void total_kernel(CrossEntropyRows args) {
  const auto* losses = static_cast<const acc_t*>(args.losses);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < args.rows; row += kBlockThreads) {
    sum += losses[row];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *args.total = args.mean ? sum / *args.denominator : sum;
  }
}

template <typename scalar_t>
__global__ void scale_kernel(
    scalar_t* gradient, int64_t count, int64_t classes, const accumulator_t<scalar_t>* factor, bool per_row) {
  using acc_t = accumulator_t<scalar_t>;
  if (!per_row && *factor == acc_t(1)) {
    return;
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const acc_t by = factor[per_row ? i / classes : 0];
    if (by != acc_t(1)) {
      gradient[i] = narrow<scalar_t>(widen<acc_t>(gradient[i]) * by);
    }
  }
}

template <typename scalar_t>
cudaError_t launch(const CrossEntropyRows& args, cudaStream_t stream) {
  using acc_t = accumulator_t<scalar_t>;
  prepare_kernel<acc_t><<<1, kBlockThreads, 0, stream>>>(args);
  if (args.rows > 0 && args.classes > 0) {
    constexpr int64_t pack = Pack<scalar_t>::size;
    const bool packed = args.classes % pack == 0 && is_aligned(args.logits) && is_aligned(args.gradient);
    const int64_t units = packed ? args.classes / pack : args.classes;
    int threads = 1;
    while (threads < kMaxRowThreads && threads * 4 < units) {
      threads *= 2;
    }
    const dim3 block(threads, std::max(1, kBlockThreads / threads));
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((args.rows + block.y - 1) / block.y, 1 << 20));
    if (packed && units <= static_cast<int64_t>(threads) * kHeldPacks) {
      rows_kernel<scalar_t, true, true><<<blocks, block, 0, stream>>>(args);
    } else if (packed) {
      rows_kernel<scalar_t, true, false><<<blocks, block, 0, stream>>>(args);
    } else {
      rows_kernel<scalar_t, false, false><<<blocks, block, 0, stream>>>(args);
    }
  }
  if (args.total != nullptr) {
    total_kernel<acc_t><<<1, kBlockThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template <typename scalar_t>
cudaError_t launch_scale(
    void* gradient, int64_t rows, int64_t classes, const void* factor, bool per_row, cudaStream_t stream) {
  const int64_t count = rows * classes;
  if (count == 0) {
    return cudaSuccess;
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + kBlockThreads - 1) / kBlockThreads, 1 << 16));
  scale_kernel<scalar_t><<<blocks, kBlockThreads, 0, stream>>>(
      static_cast<scalar_t*>(gradient), count, classes, static_cast<const accumulator_t<scalar_t>*>(factor), per_row);
  return cudaGetLastError();
}

}  // namespace

cudaError_t cross_entropy(const CrossEntropyRows& args, cudaStream_t stream) {
  switch (args.type) {
    case LogitsType::Float:
      return launch<float>(args, stream);
    case LogitsType::Double:
      return launch<double>(args, stream);
    case LogitsType::BFloat16:
      return launch<__nv_bfloat16>(args, stream);
    case LogitsType::Half:
      return launch<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t scale_rows(
    void* gradient, LogitsType type, int64_t rows, int64_t classes, const void* factor, bool per_row, cudaStream_t stream) {
  switch (type) {
    case LogitsType::Float:
      return launch_scale<float>(gradient, rows, classes, factor, per_row, stream);
    case LogitsType::Double:
      return launch_scale<double>(gradient, rows, classes, factor, per_row, stream);
    case LogitsType::BFloat16:
      return launch_scale<__nv_bfloat16>(gradient, rows, classes, factor, per_row, stream);
    case LogitsType::Half:
      return launch_scale<__half>(gradient, rows, classes, factor, per_row, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lightkit::cuda
