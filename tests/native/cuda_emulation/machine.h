// A GPU made of fibers: runs the threads of a CUDA kernel on one CPU thread, and ends the process with a
// message where the kernel breaks a rule of CUDA that happens to be harmless here.
//
// Each thread of a block, or of a cluster of blocks, is a fiber that runs until it has to wait for others.
// What is checked: that all threads of a block meet at the same barrier, that the lanes of a warp meet at the
// same collective, that shared memory is used as it was asked for, that launches keep to the device's limits.
// Shared memory starts as garbage, and the order in which threads run can be changed: a missing barrier shows
// as a wrong result. Memory errors and misaligned accesses are left to the sanitizers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

using Site = std::source_location;

// What the emulated device can do.
struct Device {
  int largest_cluster = 16;  // 0: none, as before sm_90
  int portable_cluster = 8;
  size_t block_shared = 48 << 10;
  size_t block_shared_opt_in = 227 << 10;
};
inline Device device;

// In which order threads, and blocks, get their turn.
enum class Order { Forward, Backward, Shuffled };
inline Order order = Order::Forward;

// What a kernel may do beyond the defaults, by cudaFuncSetAttribute.
struct Permission {
  size_t dynamic_shared = 48 << 10;
  bool large_cluster = false;
};
Permission& permission(const void* kernel);

struct Launch {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;
  unsigned cluster = 1;
  const void* kernel = nullptr;
  std::function<void()> thread;
};

// Runs the kernel to its end. Returns false if the device refuses the launch or the kernel traps; after a
// trap every later launch is refused, too, until `reset`.
bool run(const Launch& launch);
void reset();
bool trapped();
int64_t launches();

// Thrown by __trap() and caught at the bottom of the fiber.
struct Trap {};

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Called by kernels.
void check_launch_bounds(int threads, int blocks_per_multiprocessor = 1);
void block_barrier(Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
unsigned cluster_rank();
unsigned cluster_size();
int lane();
void* peer_shared(void* pointer, unsigned rank, Site site);
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
void warp_exchange(
    unsigned mask, const void* mine, size_t bytes, Site site, const std::function<void(const void* (*)(int))>& read);

// Storage of a `__shared__` variable of this block; `key` is a lambda, whose type is the variable's identity.
template <typename T, typename Key>
T& shared_variable(Key) {
  static const char identity = 0;
  return *static_cast<T*>(static_shared(&identity, sizeof(T), alignof(T)));
}

// The value that lane `source` brings to this collective.
template <typename T>
T from_lane(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "CUDA shuffles words of 4 and 8 bytes");
  T result;
  warp_exchange(mask, &value, sizeof(T), site, [&](const void* (*of_lane)(int)) {
    std::memcpy(static_cast<void*>(&result), of_lane(source), sizeof(T));
  });
  return result;
}

}  // namespace emulation
