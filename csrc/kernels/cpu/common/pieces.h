// Shares pieces of work out over threads of unequal speed.
#pragma once

#include "../../common/ceil_div.h"
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace lightkit::cpu {

// The fewest multiply-adds for which a thread is woken. Chosen: at 64 multiply-adds a cycle about 2000 cycles.
inline constexpr int64_t kMacsPerThread = int64_t(1) << 17;

// Calls run(scratch, begin, end) for pieces of [0, count), which cost `macs` multiply-adds in all; each thread makes
// the scratch of its pieces with make_scratch(). Each thread starts with pieces of its own, and then takes over the
// pieces of other threads, whose cores may be slowed down by other processes.
template <typename MakeScratch, typename Run>
void in_pieces(int64_t count, int64_t piece, int64_t macs, const MakeScratch& make_scratch, const Run& run) {
  struct alignas(64) Queue {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t pieces = ceil_div(count, piece);
  const int64_t allowed = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::max<int64_t>(1, std::min({allowed, macs / kMacsPerThread, pieces}));
  const auto queues = std::make_unique<Queue[]>(threads);
  for (int64_t t = 0; t < threads; ++t) {
    queues[t].next = t * pieces / threads;
    queues[t].end = (t + 1) * pieces / threads;
  }
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make_scratch();
    for (int64_t own = begin; own < end; ++own) {
      for (int64_t t = 0; t < threads; ++t) {
        Queue& queue = queues[(own + t) % threads];
        for (int64_t p = queue.next++; p < queue.end; p = queue.next++) {
          run(scratch, p * piece, std::min(count, (p + 1) * piece));
        }
      }
    }
  });
}

// Calls run(begin, end), which needs no scratch.
template <typename Run>
void in_pieces(int64_t count, int64_t piece, int64_t macs, const Run& run) {
  in_pieces(count, piece, macs, [] { return 0; }, [&](int, int64_t begin, int64_t end) { run(begin, end); });
}

}  // namespace lightkit::cpu
