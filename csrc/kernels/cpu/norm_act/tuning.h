// The tuned constants of the normalization on a CPU. "Chosen" means: not compared with other values in
// benchmarks/results, where norm_act.csv compares the kernels, with these constants, to torch.
#pragma once

#include <cstdint>

namespace lightkit::cpu::norm_act {

// Vectors of channels that a loop over rows takes at once. Derived: the gradient of the input keeps four coefficients
// of each in registers, 16 of the 32 of AVX-512, or 8 of the 16 of AVX2.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = 2;
#endif

// Chains of additions in a loop that sums. Derived: two sums of each take 16 registers with AVX-512, or 8 with AVX2,
// and hide a latency of 4 cycles at two additions a cycle.
inline constexpr int kChains = 2 * kVectors;

// Rows whose sums are accumulated in the type of the data, before they are added in double precision. Chosen: a chain
// then has at most 128 additions.
inline constexpr int64_t kBlockRows = 256;

// The most rows of a block that are added up in chains. Chosen: a chain then has at most 16 additions, and a block 8 or
// more sums of chains.
inline constexpr int64_t kChainRows = 32;

// Rows whose mean is the pivot of a first block. Chosen: 1/8 of a block, so that they cost little.
inline constexpr int64_t kPivotRows = 32;

// The most parts that the rows are summed in, whatever the number of threads: the order of additions must not depend on
// it. Chosen: it is the most threads that one sum can use.
inline constexpr int64_t kMostParts = 32;

// Bytes of a tensor that a loop over groups of channels adds up at a time. Chosen: half of an L1 of 32 KiB. With 2 MiB
// of 512 channels on an AMD EPYC, the sums of backward took 0.15 ms so, 0.36 ms with 4 KiB, whose chains are too short,
// and 0.38 ms with 2 rows.
inline constexpr int64_t kChainBytes = 16 * 1024;

// Bytes of a tensor that a loop over groups of channels reads or writes at a time: 1 row of 256 or more channels, so
// that the processor sees few streams of consecutive addresses. With 8 MiB of 512 channels on an AMD EPYC, the pass
// that writes the gradients took 1.5 ms so, and 2.8 ms with 4 KiB.
inline constexpr int64_t kTileBytes = 1024;

// The fewest elements of the input for which a thread is woken. Chosen: they take a core about 5 microseconds.
inline constexpr int64_t kElementsPerThread = 16 * 1024;

}  // namespace lightkit::cpu::norm_act
