// The tuned constants of cross-entropy on a CPU, each with its derivation or measurement.
//
// "Chosen" means: set while the kernel was written, on an AVX-512 Xeon, and not compared with other values in
// benchmarks/results. cross_entropy.csv there compares the kernel, with these constants, to torch and to the time of a
// copy.
#pragma once

#include <cstdint>

namespace lightkit::cpu::cross_entropy {

// Up to this many classes, rows are worked on side by side. Derived: with AVX-512 a row of 64 floats is 4 vectors, too
// few for the two chains of WideRows.
inline constexpr int64_t kNarrowClasses = 64;

// The most classes of a call whose classes are not the last dimension. Derived: three buffers of 128 classes by 16
// lanes take 24 KiB in float32, within L1.
inline constexpr int64_t kMaxStridedClasses = 128;
static_assert(kNarrowClasses <= kMaxStridedClasses);

// The fewest logits for which a thread is woken. Chosen: a thread's share of the work must take longer than waking
// the thread.
inline constexpr int64_t kLogitsPerThread = 8192;

// Classes of a block of a wide row, which stays in L1 between its two uses. Derived: its logits and exponentials take
// 8 KiB in float32.
inline constexpr int64_t kBlockClasses = 1024;

// Gradients from this size on are stored past the caches. Chosen: a larger gradient would not stay in the
// caches anyway.
inline constexpr int64_t kStreamedBytes = int64_t(32) << 20;

}  // namespace lightkit::cpu::cross_entropy
