// Stands in for CUDA's header of this name where the kernels are compiled by a C++ compiler for ../machine.h:
// the part of the language and of the run-time library that they use.
#pragma once

#include "../machine.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __grid_constant__

// ---- the run-time library

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct EmulatedStream*;

enum cudaDeviceAttr { cudaDevAttrClusterLaunch, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  dim3 clusterDim{};
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t emulated_error = cudaSuccess;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = std::exchange(emulated_error, cudaSuccess);
  return emulation::trapped() ? cudaErrorLaunchFailure : error;
}

// A device of its own for each that the emulation can be, as kernels remember what a device can do.
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device.largest_cluster;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrClusterLaunch ? emulation::device.largest_cluster > 0 : 132;
  return cudaSuccess;
}

inline const void* emulated_address(auto* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  auto& permission = emulation::permission(emulated_address(kernel));
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (static_cast<size_t>(value) > emulation::device.block_shared_opt_in) {
      return cudaErrorInvalidValue;
    }
    permission.dynamic_shared = value;
  } else {
    if (emulation::device.largest_cluster == 0) {
      return cudaErrorInvalidValue;
    }
    permission.large_cluster = value != 0;
  }
  return cudaSuccess;
}

inline unsigned emulated_cluster(const cudaLaunchConfig_t& config) {
  return config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  const bool large = emulation::permission(emulated_address(kernel)).large_cluster;
  const int size = static_cast<int>(emulated_cluster(*config));
  if (size > emulation::device.portable_cluster && !large) {
    return cudaErrorInvalidValue;
  }
  *clusters = size <= emulation::device.largest_cluster ? 1 : 0;
  return cudaSuccess;
}

inline cudaError_t emulated_launch(const emulation::Launch& launch) {
  if (emulation::run(launch)) {
    return cudaSuccess;
  }
  return emulated_error = emulation::trapped() ? cudaErrorLaunchFailure : cudaErrorInvalidValue;
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  return emulated_launch(
      {config->gridDim,
       config->blockDim,
       config->dynamicSmemBytes,
       emulated_cluster(*config),
       emulated_address(kernel),
       [&] { kernel(static_cast<Expected>(arguments)...); }});
}

// What `kernel<<<grid, block, shared, stream>>>(arguments)` is rewritten to.
template <typename... Expected>
auto emulated_kernel(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr) {
  return [=](auto&&... arguments) {
    emulated_launch(
        {grid, block, shared, 1, emulated_address(kernel), [&] { kernel(static_cast<Expected>(arguments)...); }});
  };
}

// ---- what kernels call

inline void __syncthreads(emulation::Site site = emulation::Site::current()) {
  emulation::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Site site = emulation::Site::current()) {
  emulation::from_lane(mask, 0, emulation::lane(), site);
}

// The lane of the same segment of `width` lanes, or this one where `source` is in another.
inline int emulated_source(int source, int width) {
  const int lane = emulation::lane();
  return source >= 0 && source / width == lane / width ? source : lane;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulation::Site site = emulation::Site::current()) {
  return emulation::from_lane(mask, value, emulation::lane() / width * width + source % width, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulation::Site site = emulation::Site::current()) {
  return emulation::from_lane(mask, value, emulated_source(emulation::lane() ^ bits, width), site);
}

template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned by, int width = 32, emulation::Site site = emulation::Site::current()) {
  return emulation::from_lane(mask, value, emulated_source(emulation::lane() + static_cast<int>(by), width), site);
}

// Only one fiber runs at a time: what is written is visible, and an operation is atomic.
inline void __threadfence() {}

template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, static_cast<T>(*address + value));
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}

inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

[[noreturn]] inline void __trap() {
  throw emulation::Trap{};
}

// These are overloads of the global namespace in CUDA.
using std::exp;
using std::exp2;
using std::expm1;
using std::fmax;
using std::isfinite;
using std::log;
using std::max;
using std::min;
using std::pow;
using std::sqrt;
using std::tanh;
