// Cross-entropy of rows too wide for one block: a cluster of blocks keeps a row in the registers of all its threads.
// Its warps exchange their sums once, through the shared memory of every block. Requires sm_90.
#pragma once

#include "wide.cuh"

#include <cooperative_groups.h>

#include <array>
#include <atomic>

namespace lightkit::cuda::cross_entropy {

template <typename scalar_t, bool plain>
__global__ void __launch_bounds__(kWideThreads, kResident<scalar_t, plain>)
    cluster_kernel(const __grid_constant__ Rows args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using acc_t = accumulator_t<scalar_t>;
  __shared__ Normalizer<acc_t> entries[kMaxWarps];
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  // A block's shared memory must not be written before the block runs; the wait is after the loads.
  cluster.barrier_arrive();
  const Team team{rank * kWideThreads + static_cast<int>(threadIdx.x), blocks * kWideThreads};
  share_row<scalar_t, plain, Pack<scalar_t>::size, kWidePacks, true>(
      args, blockIdx.x / blocks, team, [&](Normalizer<acc_t> value, bool has_soft) {
        constexpr int warps = kWideThreads / 32;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        value = merge_lanes(value, 32, has_soft);
        cluster.barrier_wait();
        if (lane < blocks) {
          cluster.map_shared_rank(entries, lane)[rank * warps + threadIdx.x / 32] = value;
        }
        cluster.barrier_arrive();
        cluster.barrier_wait();
        return merge_entries(entries, blocks * warps, has_soft);
      });
#else
  __trap();
#endif
}

struct ClusterConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterConfig(unsigned blocks, unsigned cluster, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kWideThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterConfig(const ClusterConfig&) = delete;
};

// Asks the device for the largest cluster. A size that the device refuses is not an error.
template <typename scalar_t, bool plain>
int query_largest_cluster(int device) {
  int supported = 0;
  if (cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device) != cudaSuccess || supported == 0) {
    return 1;
  }
  constexpr auto kernel = cluster_kernel<scalar_t, plain>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    cudaGetLastError();
  }
  for (int size = kMaxCluster; size > 1; size /= 2) {
    const ClusterConfig launch(size, size, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess && clusters > 0) {
      return size;
    }
    cudaGetLastError();
  }
  return 1;
}

// Returns the most blocks that a cluster of this kernel has on the current device; 1 without clusters.
template <typename scalar_t, bool plain>
int largest_cluster() {
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= static_cast<int>(known.size())) {
    return 1;
  }
  int size = known[device].load();
  if (size == 0) {
    size = query_largest_cluster<scalar_t, plain>(device);
    known[device].store(size);
  }
  return size;
}

template <typename scalar_t, bool plain>
cudaError_t launch_clusters(const Rows& args, int size, cudaStream_t stream) {
  const ClusterConfig launch(static_cast<unsigned>(args.rows * size), size, stream);
  return cudaLaunchKernelEx(&launch.config, cluster_kernel<scalar_t, plain>, args);
}

}  // namespace lightkit::cuda::cross_entropy
