// The tuned constants of the 8-bit chain, each with its derivation or measurement.
//
// "Chosen" means: set while the kernel was written, on an AVX-512 Xeon with VNNI (48 KiB of L1 and 2 MiB of L2 a core),
// and not compared with other values in benchmarks/results. int8_chain.csv there compares the chain, with these
// constants, to other programs.
#pragma once

#include <cstdint>

namespace lightkit::cpu::int8_chain {

// Vectors of 16 output channels whose weights lie side by side. Derived: the widest register tile below.
inline constexpr int kBlockVectors = 4;

// A register tile: the sums of kPositions[vectors - 1] positions by `vectors` vectors of output channels. Derived: at
// least 10 sums hide the 5 cycles of vpdpbusd at 2 a cycle; sums, weights and a broadcast input take at most 29 of the
// 32 registers of AVX-512, or 13 of the 16 of AVX2, in which a vector takes two. Without VNNI, weights and inputs take
// two registers each.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
inline constexpr int kMaxVectors = 4;
inline constexpr int kPositions[kMaxVectors] = {8, 8, 8, 6};
#elif defined(CPU_CAPABILITY_AVX512)
inline constexpr int kMaxVectors = 4;
inline constexpr int kPositions[kMaxVectors] = {8, 8, 6, 4};
#else
inline constexpr int kMaxVectors = 1;
inline constexpr int kPositions[kMaxVectors] = {4};
#endif
inline constexpr int kMaxPositions = 8;

// The most images that a thread takes through a layer before the next layer, and the bytes of their activations up to
// which it takes several. Chosen: the weights of a layer on few positions, such as a linear one, are read once for all
// of them; activations and the weights of a tile stay in L1.
inline constexpr int64_t kMaxGroup = 4;
inline constexpr int64_t kGroupBytes = 40 << 10;

// How many times as fast a multiply-add is as one in float, for which the threads' shares are made. Derived: vpdpbusd
// has 64 products where a vector of float has 16.
inline constexpr int64_t kProductsPerFloat = 4;

}  // namespace lightkit::cpu::int8_chain
