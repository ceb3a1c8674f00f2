// The tuned constants of the decode step on a CPU.
#pragma once

#include <cstdint>

namespace lightkit::cpu::decode {

// The rows of a block, whose weights of one column are one vector of float32 with AVX-512, two with AVX2. Derived: the
// layout does not depend on the processor.
inline constexpr int64_t kBlock = 16;

// The rows of a panel. Derived: a sum waits four cycles for the one before, so that four blocks keep one multiply-add a
// cycle in flight, which is more than the caches deliver weights for.
inline constexpr int64_t kPanel = 4 * kBlock;

// The inputs that a pass over a panel multiplies at once. Derived: their sums and one block of weights fill the
// registers, 16 + 4 of 32 with AVX-512, 8 of 16 with AVX2.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kInputs = 4;
#else
inline constexpr int kInputs = 1;
#endif

// The fewest multiply-adds for which a thread is woken. Derived: the float32 weights of so many, 1 MiB, take a core 30
// to 80 microseconds to read from the last cache, and a wait for another thread takes up to 5.
inline constexpr int64_t kMacsPerThread = int64_t(1) << 18;

}  // namespace lightkit::cpu::decode
