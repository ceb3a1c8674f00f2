// Memory of large gradients, kept from one step to the next.
#pragma once

#include <cstddef>

namespace lightkit {

// The first touch of fresh memory costs several times what a kernel does with it: the system clears every page. So a
// large buffer that is given back goes to the next one of about that size. At most two buffers and 1 GiB are kept.
struct PooledBuffer {
  void* data;  // aligned to a huge page
  size_t bytes;
};

// Smaller memory is torch's to allocate.
inline constexpr size_t kLeastPooledBytes = size_t(1) << 20;

// Raises std::bad_alloc.
PooledBuffer take_buffer(size_t bytes);
void give_back_buffer(PooledBuffer buffer);

}  // namespace lightkit
