// Sums over all rows of a cross-entropy: what a mean divides by, and the loss. In a fixed order, without atomics
// on what is summed, by as many blocks as there are parts in the scratch memory.
#pragma once

#include "cross_entropy.h"
#include "dtype.cuh"
#include "sum.cuh"

#include <algorithm>
#include <cstdio>

namespace lightkit::cuda {

constexpr int kSumThreads = 256;
constexpr int64_t kRowsWorthAPart = 2048;

__host__ __device__ inline int parts_of(int64_t rows) {
  const int64_t parts = (rows + kRowsWorthAPart - 1) / kRowsWorthAPart;
  return static_cast<int>(parts < 1 ? 1 : parts > CrossEntropyScratch::kParts ? CrossEntropyScratch::kParts : parts);
}

[[noreturn]] __device__ __noinline__ inline void refuse_target(int64_t target, int64_t row, int64_t classes) {
  printf(
      "lightkit cross_entropy: Target %lld is out of bounds: row %lld must name one of the %lld classes or be "
      "ignore_index\n",
      static_cast<long long>(target),
      static_cast<long long>(row),
      static_cast<long long>(classes));
  __trap();
}

// Checks the targets of rows [begin, end) and sums their weights. For all threads of a block.
template <typename acc_t>
__device__ double check_targets(const CrossEntropyRows& args, int64_t begin, int64_t end) {
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

template <typename acc_t>
__device__ double sum_losses(const CrossEntropyRows& args, int64_t begin, int64_t end) {
  const auto* losses = static_cast<const acc_t*>(args.losses);
  double sum = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    sum += losses[row];
  }
  return block_sum(sum);
}

__device__ inline void write_total(const CrossEntropyRows& args, double value) {
  switch (args.total_type) {
    case LogitsType::Float:
      *static_cast<float*>(args.total) = static_cast<float>(value);
      break;
    case LogitsType::Double:
      *static_cast<double*>(args.total) = value;
      break;
    case LogitsType::BFloat16:
      *static_cast<__nv_bfloat16*>(args.total) = narrow<__nv_bfloat16>(static_cast<float>(value));
      break;
    case LogitsType::Half:
      *static_cast<__half*>(args.total) = narrow<__half>(static_cast<float>(value));
      break;
  }
}

// What a mean divides by, from the parts. Each warp adds them up for itself, which costs less than a launch that
// would do it once; all its lanes must take part.
__device__ inline double mean_denominator(const CrossEntropyRows& args) {
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
  const int64_t share = (rows + gridDim.x - 1) / gridDim.x;
  const int64_t begin = share * blockIdx.x;
  return {min(begin, rows), min(begin + share, rows)};
}

// A block a part: checks every target, and sums what a mean divides by.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads) prepare_kernel(const __grid_constant__ CrossEntropyRows args) {
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

// A block a part: sums its losses. The one that finishes last adds up the parts.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads) total_kernel(const __grid_constant__ CrossEntropyRows args) {
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
    // From L2, where the other blocks have put them.
    sum = block_sum(threadIdx.x < gridDim.x ? __ldcg(&args.scratch->losses[threadIdx.x]) : 0.0);
  }
  const double denominator = args.mean ? mean_denominator(args) : 1.0;
  if (threadIdx.x == 0) {
    write_total(args, sum / denominator);
  }
}
static_assert(CrossEntropyScratch::kParts <= kSumThreads, "a thread adds at most one part");

}  // namespace lightkit::cuda
