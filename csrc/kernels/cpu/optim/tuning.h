// The tuned constants of the optimizers on a CPU.
//
// All of them were chosen while the kernels were written, and not compared with other values in benchmarks/results.
// sgd.csv and adam.csv there compare the kernels, with these constants, to torch and to the time of a copy.
#pragma once

#include <cstdint>

namespace lightkit::cpu::optim {

// The fewest elements for which a thread is woken: a thread's share of the work must take longer than waking it.
inline constexpr int64_t kElementsPerThread = 32768;

// Threads share a tensor only at multiples of so many elements. Derived: a cache line of the smallest type and a
// multiple of every vector, so that no cache line has two writers.
inline constexpr int64_t kRangeMultiple = 64;

// Elements whose squares are one term of the norm: the order of additions does not depend on the threads.
inline constexpr int64_t kNormRun = 16384;

// Elements that are converted to the accumulation type at a time. Derived: the two to four buffers of a step are 2 to 4
// KiB in float, within L1.
inline constexpr int64_t kNormBlock = 512;
inline constexpr int64_t kAdamBlock = 512;
inline constexpr int64_t kSgdBlock = 256;
inline constexpr int64_t kMasterBlock = 256;

// Elements of SGD that are stepped and then masked. Derived: parameter, gradient and momentum take 12 KiB in float,
// within L1.
inline constexpr int64_t kMaskBlock = 1024;

}  // namespace lightkit::cpu::optim
