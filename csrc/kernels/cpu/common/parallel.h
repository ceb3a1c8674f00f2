// Shares work out over torch's threads, on a machine that other processes may use, too.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace lightkit::cpu {

// Measures, ten times a second, which share of its time the calling thread waits for a core. If the share is large,
// threads that wait for each other sleep instead of spinning on cores that other processes need. Returns true if the
// share is so large that one thread gets more done than several that wait for each other.
bool is_crowded();

// Calls f(begin, end) for ranges that make up [begin, end), as at::parallel_for does. The results of f must not depend
// on the ranges.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin > grain && is_crowded()) {
    const at::internal::ThreadIdGuard thread(0);
    const c10::ParallelGuard guard(true);
    f(begin, end);
  } else {
    at::parallel_for(begin, end, grain, f);
  }
}

}  // namespace lightkit::cpu
