// Kernels with one mistake each, which the emulation has to find, and one without.
#include "faults.h"

#include <cooperative_groups.h>

#include <cstdio>

namespace lightkit::cuda {
namespace {

constexpr int kThreads = 64;

struct alignas(16) Four {
  float values[4];
};

// Shifts the numbers of a block by one through shared memory.
template <bool before, bool after>
__global__ void __launch_bounds__(kThreads) shift_kernel(float* out, int rounds) {
  __shared__ float shared[kThreads];
  for (int round = 0; round < rounds; ++round) {
    shared[threadIdx.x] = static_cast<float>(threadIdx.x + round);
    if (before) {
      __syncthreads();
    }
    out[threadIdx.x] += shared[(threadIdx.x + 1) % kThreads];
    if (after) {
      __syncthreads();
    }
  }
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void different_barriers_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void divergent_shuffle_kernel(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 2);
  } else {
    __syncthreads();
  }
}

__global__ void shared_overflow_kernel(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x + 1] = 0;
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void global_overflow_kernel(float* out) {
  out[threadIdx.x + 1] = 0;
}

__global__ void misaligned_kernel(float* out) {
  *reinterpret_cast<Four*>(out + 1) = Four{};
}

__global__ void __launch_bounds__(32) bounds_kernel(float* out) {
  out[threadIdx.x] = 0;
}

template <bool started, bool stays>
__global__ void peer_kernel(float* out) {
  __shared__ float mine;
  const auto cluster = cooperative_groups::this_cluster();
  if (started) {
    cluster.sync();
  }
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  *cluster.map_shared_rank(&mine, next) = static_cast<float>(cluster.block_rank());
  cluster.sync();
  out[cluster.block_rank()] = mine;
  if (!stays && cluster.block_rank() == 0) {
    return;
  }
  out[cluster.block_rank()] = *cluster.map_shared_rank(&mine, next);
  if (stays) {
    cluster.sync();
  }
}

__global__ void trap_kernel(float* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x == 3) {
    printf("thread %d gives up\n", static_cast<int>(threadIdx.x));
    __trap();
  }
}

cudaError_t in_cluster(void (*kernel)(float*), float* out, unsigned size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(1);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, out);
}

}  // namespace

cudaError_t fault(const std::string& name, float* out) {
  if (name == "none") {
    shift_kernel<true, true><<<1, kThreads>>>(out, 2);
  } else if (name == "no_barrier_before_reading") {
    shift_kernel<false, true><<<1, kThreads>>>(out, 2);
  } else if (name == "no_barrier_before_writing_again") {
    shift_kernel<true, false><<<1, kThreads>>>(out, 2);
  } else if (name == "divergent_barrier") {
    divergent_barrier_kernel<<<1, kThreads>>>(out);
  } else if (name == "different_barriers") {
    different_barriers_kernel<<<1, kThreads>>>(out);
  } else if (name == "divergent_shuffle") {
    divergent_shuffle_kernel<<<1, kThreads>>>(out);
  } else if (name == "shared_overflow") {
    shared_overflow_kernel<<<1, kThreads>>>(out);
  } else if (name == "global_overflow") {
    global_overflow_kernel<<<1, kThreads>>>(out);
  } else if (name == "misaligned") {
    misaligned_kernel<<<1, 1>>>(out);
  } else if (name == "bounds") {
    bounds_kernel<<<1, kThreads>>>(out);
  } else if (name == "trap") {
    trap_kernel<<<1, kThreads>>>(out);
  } else if (name == "block_too_large") {
    divergent_barrier_kernel<<<1, 2048>>>(out);
  } else if (name == "cluster_too_large") {
    return in_cluster(peer_kernel<true, true>, out, 16);
  } else if (name == "cluster") {
    return in_cluster(peer_kernel<true, true>, out, 4);
  } else if (name == "peer_not_started") {
    return in_cluster(peer_kernel<false, true>, out, 4);
  } else if (name == "peer_ended") {
    return in_cluster(peer_kernel<true, false>, out, 4);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace lightkit::cuda
