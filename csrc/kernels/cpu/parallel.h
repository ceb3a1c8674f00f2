// Shares work out over torch's threads, on a machine that others may use as well.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace lightkit::cpu {

// Looks, every now and then, how much of its time the calling thread has waited for a core. Where it has, threads that
// wait for each other sleep from then on instead of spinning on the cores that the others need. Returns true where so
// many want the cores that one thread gets more done than several that wait for each other.
bool is_crowded();

// Calls f(begin, end) for ranges that together make up [begin, end), as at::parallel_for does. What f computes must not
// depend on the ranges.
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
