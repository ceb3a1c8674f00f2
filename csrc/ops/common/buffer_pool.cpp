#include "buffer_pool.h"

#include "../../kernels/common/ceil_div.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <mutex>
#include <new>

namespace lightkit {
namespace {

// The most bytes and buffers that the pool keeps. Chosen: a step has two large gradients, such as those of logits and
// of a head.
constexpr size_t kMaxKept = size_t(1) << 30;
constexpr size_t kMaxBuffers = 2;

// The size of a huge page: with this alignment the system can use huge pages.
constexpr size_t kAlignment = size_t(1) << 21;

class Pool {
 public:
  PooledBuffer take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      // A buffer of more than twice the size would waste memory.
      const auto fits = [&](const PooledBuffer& b) { return b.bytes >= bytes && b.bytes / 2 <= bytes; };
      // The last one that was given back is the likeliest to be in the cache.
      if (const auto found = std::find_if(kept_.rbegin(), kept_.rend(), fits); found != kept_.rend()) {
        const PooledBuffer buffer = *found;
        kept_.erase(std::next(found).base());
        return buffer;
      }
    }
    const size_t rounded = round_up(bytes, kAlignment);
    void* data = std::aligned_alloc(kAlignment, rounded);
    if (data == nullptr) {
      throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    // A hint: without huge pages the first touch is slower.
    madvise(data, rounded, MADV_HUGEPAGE);
#endif
    return {data, rounded};
  }

  void give_back(PooledBuffer buffer) {
    const std::lock_guard lock(mutex_);
    kept_.push_back(buffer);
    const auto total = [this] {
      size_t sum = 0;
      for (const auto& b : kept_) {
        sum += b.bytes;
      }
      return sum;
    };
    while (kept_.size() > kMaxBuffers || total() > kMaxKept) {
      std::free(kept_.front().data);
      kept_.pop_front();
    }
  }

 private:
  std::mutex mutex_;
  std::deque<PooledBuffer> kept_;
};

Pool& pool() {
  // It is never destroyed: tensors may outlive static objects.
  static Pool* const instance = new Pool();
  return *instance;
}

}  // namespace

PooledBuffer take_buffer(size_t bytes) {
  return pool().take(bytes);
}

void give_back_buffer(PooledBuffer buffer) {
  pool().give_back(buffer);
}

}  // namespace lightkit
