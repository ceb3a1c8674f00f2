// A pool that keeps the memory of large gradients from one step to the next.
#pragma once

#include <cstddef>

namespace lightkit {

// The first touch of fresh memory takes several times as long as a kernel (benchmarks/results/freed_memory.csv): the
// system clears every page. So a buffer that is given back serves the next request of about its size. The pool keeps at
// most two buffers and 1 GiB.
struct PooledBuffer {
  void* data;  // [bytes], aligned to a huge page
  size_t bytes;
};

// The smallest buffer of the pool; torch allocates smaller memory. Chosen.
inline constexpr size_t kMinPooledBytes = size_t(1) << 20;

// Raises std::bad_alloc.
PooledBuffer take_buffer(size_t bytes);
void give_back_buffer(PooledBuffer buffer);

}  // namespace lightkit
