#include "step.h"

#include "dtype.cuh"
#include "sum.cuh"

#include <algorithm>

namespace lightkit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRun = 16384;

// As many as fit into 4 KiB of a kernel's arguments.
constexpr int kGradientsPerLaunch = 160;
constexpr int kCountsPerLaunch = 500;

struct GradientBatch {
  struct Entry {
    const void* data;
    int64_t numel;
    int first_run;
    ParameterType type;
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
  return (gradient.numel + kRun - 1) / kRun;
}

// Of the elements [begin, end), as far as this thread goes.
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
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * width; i < packed_end; i += kThreads * width) {
      const auto pack = *reinterpret_cast<const Pack<scalar_t>*>(values + i);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        add(pack.values[k]);
      }
    }
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
    add(values[i]);
  }
  return sum;
}

// A block a run.
__global__ void __launch_bounds__(kThreads) square_sum_kernel(const __grid_constant__ GradientBatch batch, int gradients) {
  const int run = static_cast<int>(blockIdx.x);
  int low = 0, high = gradients;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_run <= run ? low : high) = middle;
  }
  const GradientBatch::Entry& entry = batch.entries[low];
  const int64_t begin = static_cast<int64_t>(run - entry.first_run) * kRun;
  const int64_t end = min(begin + kRun, entry.numel);
  double sum = 0;
  switch (entry.type) {
    case ParameterType::Float:
      sum = square_sum<float>(entry.data, begin, end);
      break;
    case ParameterType::Double:
      sum = square_sum<double>(entry.data, begin, end);
      break;
    case ParameterType::BFloat16:
      sum = square_sum<__nv_bfloat16>(entry.data, begin, end);
      break;
    case ParameterType::Half:
      sum = square_sum<__half>(entry.data, begin, end);
      break;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    batch.sums[run] = sum;
  }
}

// One block.
__global__ void __launch_bounds__(kThreads)
norm_kernel(const double* sums, int64_t count, double factor, const float* scale, double* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *norm = sqrt(sum) * (scale == nullptr ? factor : factor / *scale);
  }
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ CountBatch batch, int counts) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
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
      square_sum_kernel<<<runs, kThreads, 0, stream>>>(batch, count);
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
  norm_kernel<<<1, kThreads, 0, stream>>>(sums, count, factor, scale, norm);
  return cudaGetLastError();
}

cudaError_t advance_counts(const std::vector<float*>& counts, const float* skip, cudaStream_t stream) {
  for (size_t start = 0; start < counts.size(); start += kCountsPerLaunch) {
    const int count = static_cast<int>(std::min<size_t>(kCountsPerLaunch, counts.size() - start));
    CountBatch batch{};
    batch.skip = skip;
    std::copy_n(counts.begin() + start, count, batch.counts);
    count_kernel<<<(count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(batch, count);
    if (const auto error = cudaGetLastError(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace lightkit::cuda
