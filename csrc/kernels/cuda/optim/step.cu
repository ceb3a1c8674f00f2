#include "step.h"

#include "../../common/ceil_div.h"
#include "../common/dtype.cuh"
#include "../common/sum.cuh"
#include "tuning.h"

#include <algorithm>

namespace lightkit::cuda::optim {
namespace {

struct GradientBatch {
  struct Entry {
    const void* data;
    int64_t numel;
    int first_run;
    ElementType type;
  };
  Entry entries[kGradientsPerLaunch];
  double* sums;
};
static_assert(sizeof(GradientBatch) <= 4096, "as many as fit into 4 KiB");

struct CountBatch {
  float* counts[kCountsPerLaunch];
  const float* skip;
};
static_assert(sizeof(CountBatch) <= 4096, "as many as fit into 4 KiB");

int64_t runs_of(const Gradient& gradient) {
  return ceil_div(gradient.numel, kNormRun);
}

// Returns this thread's part of the sum of squares of the elements [begin, end).
template <typename scalar_t>
__device__ double square_sum(const void* data, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int width = Pack<scalar_t>::size;
  const auto* values = static_cast<const scalar_t*>(data);
  double sum = 0;
  const auto add = [&sum](scalar_t value) {
    const auto x = static_cast<double>(widen<acc_t>(value));
    sum += x * x;
  };
  int64_t packed_end = begin;
  if (is_aligned(values)) {
    packed_end = begin + (end - begin) / width * width;
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * width; i < packed_end; i += kNormThreads * width) {
      const auto pack = *reinterpret_cast<const Pack<scalar_t>*>(values + i);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        add(pack.values[k]);
      }
    }
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kNormThreads) {
    add(values[i]);
  }
  return sum;
}

// One block a run.
__global__ void __launch_bounds__(kNormThreads)
    square_sum_kernel(const __grid_constant__ GradientBatch batch, int gradients) {
  const int run = static_cast<int>(blockIdx.x);
  int low = 0, high = gradients;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_run <= run ? low : high) = middle;
  }
  const GradientBatch::Entry& entry = batch.entries[low];
  const int64_t begin = static_cast<int64_t>(run - entry.first_run) * kNormRun;
  const int64_t end = min(begin + kNormRun, entry.numel);
  double sum = 0;
  switch (entry.type) {
    case ElementType::Float:
      sum = square_sum<float>(entry.data, begin, end);
      break;
    case ElementType::Double:
      sum = square_sum<double>(entry.data, begin, end);
      break;
    case ElementType::BFloat16:
      sum = square_sum<__nv_bfloat16>(entry.data, begin, end);
      break;
    case ElementType::Half:
      sum = square_sum<__half>(entry.data, begin, end);
      break;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    batch.sums[run] = sum;
  }
}

// One block adds up all sums.
__global__ void __launch_bounds__(kNormThreads)
    norm_kernel(const double* sums, int64_t count, double factor, const float* scale, double* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kNormThreads) {
    sum += sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *norm = sqrt(sum) * (scale == nullptr ? factor : factor / *scale);
  }
}

__global__ void __launch_bounds__(kNormThreads) count_kernel(const __grid_constant__ CountBatch batch, int counts) {
  const int i = static_cast<int>(blockIdx.x * kNormThreads + threadIdx.x);
  if (i < counts && (batch.skip == nullptr || *batch.skip == 0)) {
    *batch.counts[i] += 1;
  }
}

}  // namespace

int64_t count_of_square_sums(const std::vector<Gradient>& gradients) {
  int64_t count = 0;
  for (const auto& gradient : gradients) {
    count += runs_of(gradient);
  }
  return count;
}

cudaError_t square_sums(const std::vector<Gradient>& gradients, double* sums, cudaStream_t stream) {
  for (size_t start = 0; start < gradients.size(); start += kGradientsPerLaunch) {
    const int count = static_cast<int>(std::min<size_t>(kGradientsPerLaunch, gradients.size() - start));
    GradientBatch batch{};
    batch.sums = sums;
    int runs = 0;
    for (int i = 0; i < count; ++i) {
      const Gradient& gradient = gradients[start + i];
      batch.entries[i] = {gradient.data, gradient.numel, runs, gradient.type};
      runs += static_cast<int>(runs_of(gradient));
    }
    if (runs > 0) {
      square_sum_kernel<<<runs, kNormThreads, 0, stream>>>(batch, count);
      if (const auto error = cudaGetLastError(); error != cudaSuccess) {
        return error;
      }
    }
    sums += runs;
  }
  return cudaSuccess;
}

cudaError_t norm_of_square_sums(
    const double* sums, int64_t count, double factor, const float* scale, double* norm, cudaStream_t stream) {
  norm_kernel<<<1, kNormThreads, 0, stream>>>(sums, count, factor, scale, norm);
  return cudaGetLastError();
}

cudaError_t advance_counts(const std::vector<float*>& counts, const float* skip, cudaStream_t stream) {
  for (size_t start = 0; start < counts.size(); start += kCountsPerLaunch) {
    const int count = static_cast<int>(std::min<size_t>(kCountsPerLaunch, counts.size() - start));
    CountBatch batch{};
    batch.skip = skip;
    std::copy_n(counts.begin() + start, count, batch.counts);
    count_kernel<<<ceil_div(count, kNormThreads), kNormThreads, 0, stream>>>(batch, count);
    if (const auto error = cudaGetLastError(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace lightkit::cuda::optim
