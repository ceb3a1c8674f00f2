// Sums over all rows of a cross-entropy: the denominator of a mean, and the loss. One block sums each part of the rows;
// the order of additions is fixed, without atomics on the sums.
#pragma once

#include "../../common/ceil_div.h"
#include "../common/dtype.cuh"
#include "../common/refuse_target.cuh"
#include "../common/sum.cuh"
#include "cross_entropy.h"
#include "tuning.h"

#include <algorithm>

namespace lightkit::cuda::cross_entropy {

__host__ __device__ inline int parts_of(int64_t rows) {
  const int64_t parts = ceil_div(rows, kRowsPerPart);
  return static_cast<int>(parts < 1 ? 1 : parts > Scratch::kParts ? Scratch::kParts : parts);
}

// Checks the targets of rows [begin, end) and returns the sum of their weights. All threads of a block call it.
template <typename acc_t>
__device__ double check_targets(const Rows& args, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const acc_t*>(args.weight);
  double sum = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      continue;
    }
    if (target < 0 || target >= args.classes) {
      refuse_target(target, row, args.classes);
    }
    sum += weight == nullptr ? 1.0 : static_cast<double>(weight[target]);
  }
  return block_sum(sum);
}

// Returns the sum of the losses of rows [begin, end). All threads of a block call it.
template <typename acc_t>
__device__ double sum_losses(const Rows& args, int64_t begin, int64_t end) {
  const auto* losses = static_cast<const acc_t*>(args.losses);
  double sum = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    sum += losses[row];
  }
  return block_sum(sum);
}

__device__ inline void write_total(const Rows& args, double value) {
  switch (args.total_type) {
    case ElementType::Float:
      *static_cast<float*>(args.total) = static_cast<float>(value);
      break;
    case ElementType::Double:
      *static_cast<double*>(args.total) = value;
      break;
    case ElementType::BFloat16:
      *static_cast<__nv_bfloat16*>(args.total) = narrow<__nv_bfloat16>(static_cast<float>(value));
      break;
    case ElementType::Half:
      *static_cast<__half*>(args.total) = narrow<__half>(static_cast<float>(value));
      break;
  }
}

// Returns the denominator of a mean, summed over the parts. Each warp adds them up, which costs less than a launch that
// would do it once; all lanes of the warp call it.
__device__ inline double mean_denominator(const Rows& args) {
  if (args.target == nullptr) {
    return static_cast<double>(args.rows);
  }
  const int parts = parts_of(args.rows);
  if (parts == 1) {
    return args.scratch->weights[0];
  }
  const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  double sum = 0;
  for (int part = static_cast<int>(lane); part < parts; part += 32) {
    sum += args.scratch->weights[part];
  }
  return warp_sum(sum);
}

struct RowRange {
  int64_t begin;
  int64_t end;
};

__device__ inline RowRange rows_of_part(int64_t rows) {
  const int64_t share = ceil_div(rows, gridDim.x);
  const int64_t begin = share * blockIdx.x;
  return {min(begin, rows), min(begin + share, rows)};
}

// One block a part. It checks every target, and sums the part of the denominator.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads) prepare_kernel(const __grid_constant__ Rows args) {
  const RowRange range = rows_of_part(args.rows);
  const double sum =
      args.target == nullptr ? 0.0 : check_targets<accumulator_t<scalar_t>>(args, range.begin, range.end);
  if (threadIdx.x == 0) {
    args.scratch->weights[blockIdx.x] = sum;
    if (blockIdx.x == 0) {
      args.scratch->finished = 0;
    }
  }
}

// One block a part. It sums the part's losses; the block that finishes last adds up the parts.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads) total_kernel(const __grid_constant__ Rows args) {
  __shared__ bool last;
  const RowRange range = rows_of_part(args.rows);
  double sum = sum_losses<accumulator_t<scalar_t>>(args, range.begin, range.end);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      args.scratch->losses[blockIdx.x] = sum;
      __threadfence();
      last = atomicAdd(&args.scratch->finished, 1u) == gridDim.x - 1;
      __threadfence();
    }
    __syncthreads();
    if (!last) {
      return;
    }
    // Reads the sums of the other blocks from L2.
    sum = block_sum(threadIdx.x < gridDim.x ? __ldcg(&args.scratch->losses[threadIdx.x]) : 0.0);
  }
  const double denominator = args.mean ? mean_denominator(args) : 1.0;
  if (threadIdx.x == 0) {
    write_total(args, sum / denominator);
  }
}
static_assert(Scratch::kParts <= kSumThreads, "a thread adds at most one part");

}  // namespace lightkit::cuda::cross_entropy
