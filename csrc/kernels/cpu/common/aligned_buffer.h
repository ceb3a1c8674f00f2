// Uninitialised memory for kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace lightkit::cpu {

// Owns `size` uninitialised elements that begin at a cache line, so that no vector lies in two lines. Raises
// std::bad_alloc.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}

  T* data() {
    return data_.get();
  }
  const T* data() const {
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Delete {
    void operator()(T* data) const {
      ::operator delete(data, kAlignment);
    }
  };
  std::unique_ptr<T, Delete> data_;
};

}  // namespace lightkit::cpu
