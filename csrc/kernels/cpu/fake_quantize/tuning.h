// The tuned constants of the rounding of weights.
#pragma once

#include <cstdint>

namespace lightkit::cpu::fake_quantize {

// The fewest elements for which a thread is woken, as in optim/tuning.h: a pass takes about as long as one of SGD.
// Chosen.
inline constexpr int64_t kElementsPerThread = 32768;

}  // namespace lightkit::cpu::fake_quantize
