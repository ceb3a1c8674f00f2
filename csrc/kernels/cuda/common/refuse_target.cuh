// The end of a kernel that met a class index outside of the classes.
#pragma once

#include <cstdint>
#include <cstdio>

namespace lightkit::cuda {

[[noreturn]] __device__ __noinline__ inline void refuse_target(int64_t target, int64_t row, int64_t classes) {
  printf(
      "lightkit cross_entropy: Target %lld is out of bounds: row %lld must name one of the %lld classes or be "
      "ignore_index\n",
      static_cast<long long>(target),
      static_cast<long long>(row),
      static_cast<long long>(classes));
  __trap();
}

}  // namespace lightkit::cuda
