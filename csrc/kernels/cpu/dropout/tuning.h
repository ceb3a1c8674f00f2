// The tuned constants of dropout on a CPU.
#pragma once

#include <cstdint>

namespace lightkit::cpu::dropout {

// The fewest elements for which a thread is woken. Chosen: they take a core about 5 microseconds, which is what a wait
// for another thread takes.
inline constexpr int64_t kElementsPerThread = 16 * 1024;

}  // namespace lightkit::cpu::dropout
