#include "linear_cross_entropy.h"

#include "../common/dtype.cuh"
#include "../common/refuse_target.cuh"
#include "../common/sum.cuh"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace lightkit::cuda::linear_cross_entropy {
namespace {

// Threads of a block. Chosen.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The most blocks; each block works on every kMaxBlocks-th row. Chosen: more than any device runs at a time.
constexpr int64_t kMaxBlocks = 65536;

__host__ __device__ inline float lowest(float) {
  return -FLT_MAX;
}

__host__ __device__ inline double lowest(double) {
  return -DBL_MAX;
}

// The sums over some logits, which can be merged.
template <typename acc_t>
struct Sums {
  // The lowest finite number: with -inf, -inf - -inf would make NaN of classes that a bias rules out.
  acc_t maximum = lowest(acc_t());
  acc_t sum = 0;
  acc_t soft = 0;

  __device__ void add(acc_t u) {
    // NaN > maximum is false; the sum becomes NaN.
    if (u > maximum) {
      sum = sum * exp(maximum - u);
      maximum = u;
    }
    sum += exp(u - maximum);
  }

  __device__ void add(const Sums& other) {
    const acc_t both = other.maximum > maximum ? other.maximum : maximum;
    sum = sum * exp(maximum - both) + other.sum * exp(other.maximum - both);
    maximum = both;
    soft += other.soft;
  }
};

template <typename acc_t>
__device__ Sums<acc_t> warp_total(Sums<acc_t> sums) {
  for (int offset = 16; offset > 0; offset /= 2) {
    Sums<acc_t> other;
    other.maximum = __shfl_xor_sync(kFullMask, sums.maximum, offset);
    other.sum = __shfl_xor_sync(kFullMask, sums.sum, offset);
    other.soft = __shfl_xor_sync(kFullMask, sums.soft, offset);
    sums.add(other);
  }
  return sums;
}

// Returns the logit of class `begin + c` from a product.
template <typename acc_t>
__device__ acc_t finish_logit(const Slice& args, acc_t product, int64_t c) {
  const acc_t z = args.bias == nullptr ? product : product + static_cast<const acc_t*>(args.bias)[args.begin + c];
  const auto cap = static_cast<acc_t>(args.softcap);
  return cap == 0 ? z : cap * tanh(z / cap);
}

template <typename acc_t>
__device__ acc_t weight_of(const Slice& args, int64_t c) {
  return args.weight == nullptr ? acc_t(1) : static_cast<const acc_t*>(args.weight)[args.begin + c];
}

// One block works on one row at a time.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) add_slice_kernel(const __grid_constant__ Slice args) {
  __shared__ acc_t of_warp[3 * kWarps];
  auto* maximum = static_cast<acc_t*>(args.maximum);
  auto* sum = static_cast<acc_t*>(args.sum);
  auto* soft = static_cast<acc_t*>(args.soft);
  auto* target_logit = static_cast<acc_t*>(args.target_logit);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      if (threadIdx.x == 0) {
        maximum[row] = soft[row] = target_logit[row] = 0;
        sum[row] = 1;
      }
      continue;
    }
    if (target < 0 || target >= args.all_classes) {
      refuse_target(target, row, args.all_classes);
    }
    const acc_t* logits = static_cast<const acc_t*>(args.logits) + row * args.classes;
    Sums<acc_t> sums;
    for (int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
      const acc_t u = finish_logit(args, logits[c], c);
      sums.add(u);
      if (args.smooth) {
        sums.soft += weight_of<acc_t>(args, c) * u;
      }
      if (args.begin + c == target) {
        target_logit[row] = u;
      }
    }
    sums = warp_total(sums);
    if (threadIdx.x % 32 == 0) {
      acc_t* place = of_warp + threadIdx.x / 32 * 3;
      place[0] = sums.maximum;
      place[1] = sums.sum;
      place[2] = sums.soft;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Sums<acc_t> total;
      if (args.begin > 0) {
        total.maximum = maximum[row];
        total.sum = sum[row];
        total.soft = soft[row];
      }
      for (int warp = 0; warp < kWarps; ++warp) {
        Sums<acc_t> part;
        part.maximum = of_warp[warp * 3];
        part.sum = of_warp[warp * 3 + 1];
        part.soft = of_warp[warp * 3 + 2];
        total.add(part);
      }
      maximum[row] = total.maximum;
      sum[row] = total.sum;
      soft[row] = total.soft;
    }
    __syncthreads();
  }
}

// One block works on one row at a time.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const __grid_constant__ Slice args) {
  using acc_t = accumulator_t<scalar_t>;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t target = args.target[row];
    const acc_t* logits = static_cast<const acc_t*>(args.logits) + row * args.classes;
    scalar_t* gradient = static_cast<scalar_t*>(args.gradient) + row * args.classes;
    const acc_t maximum = static_cast<const acc_t*>(args.maximum)[row];
    const acc_t factor = static_cast<const acc_t*>(args.factor)[row];
    const acc_t soft_factor = static_cast<const acc_t*>(args.soft_factor)[row];
    for (int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
      if (target == args.ignore_index) {
        gradient[c] = narrow<scalar_t>(acc_t(0));
        continue;
      }
      if (args.begin + c == target) {
        gradient[c] = narrow<scalar_t>(static_cast<const acc_t*>(args.target_gradient)[row]);
        continue;
      }
      const acc_t u = finish_logit(args, logits[c], c);
      acc_t value = factor * exp(u - maximum) - (args.smooth ? soft_factor * weight_of<acc_t>(args, c) : acc_t(0));
      if (args.softcap != 0) {
        const acc_t ratio = u / static_cast<acc_t>(args.softcap);
        value *= 1 - ratio * ratio;
      }
      gradient[c] = narrow<scalar_t>(value);
    }
  }
}

unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>(std::min(rows, kMaxBlocks));
}

template <typename scalar_t>
cudaError_t launch_gradient(const Slice& args, cudaStream_t stream) {
  gradient_kernel<scalar_t><<<blocks_for(args.rows), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t add_slice(const Slice& args, cudaStream_t stream) {
  if (args.rows == 0 || args.classes == 0) {
    return cudaSuccess;
  }
  if (args.type == ElementType::Double) {
    add_slice_kernel<double><<<blocks_for(args.rows), kThreads, 0, stream>>>(args);
  } else {
    add_slice_kernel<float><<<blocks_for(args.rows), kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t slice_gradient(const Slice& args, cudaStream_t stream) {
  if (args.rows == 0 || args.classes == 0) {
    return cudaSuccess;
  }
  switch (args.type) {
    case ElementType::Float:
      return launch_gradient<float>(args, stream);
    case ElementType::Double:
      return launch_gradient<double>(args, stream);
    case ElementType::BFloat16:
      return launch_gradient<__nv_bfloat16>(args, stream);
    case ElementType::Half:
      return launch_gradient<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lightkit::cuda::linear_cross_entropy
