// Sums over the threads of a warp and of a block, in a fixed order.
#pragma once

namespace lightkit::cuda {

constexpr unsigned kFullMask = 0xffffffffu;

// Returns the sum over the lanes of a warp; every lane gets the same bits.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// Returns the sum over a block of whole warps to every thread.
__device__ inline double block_sum(double value) {
  __shared__ double partial[32];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    value += partial[warp];
  }
  return value;
}

}  // namespace lightkit::cuda
