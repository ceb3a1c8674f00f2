// The tuned constants of the convolution on a CPU, each with its derivation or measurement.
//
// "Chosen" means: set while the kernel was written, on an AVX-512 Xeon (48 KiB of L1 and 1.25 MiB of L2 a core), and
// not compared with other values in benchmarks/results. conv2d.csv there compares the kernels, with these constants, to
// torch.
#pragma once

#include "shape.h"

#include <cstdint>

namespace lightkit::cpu::conv2d {

// A register tile of sums: kPositions<vectors> positions by `vectors` vectors of output channels. Derived: at least 8
// sums hide the 4 cycles of a multiply-add at 2 a cycle; sums, weights and a broadcast input take at most 28 of the 32
// registers of AVX-512, or 15 of the 16 of AVX2. Powers of two divide the rows of usual images.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kMaxVectors = 4;
template <int vectors>
inline constexpr int kPositions = vectors == 1 ? 16
    : vectors == 4                             ? 4
                                               : 8;
#else
inline constexpr int kMaxVectors = 2;
template <int vectors>
inline constexpr int kPositions = vectors == 1 ? 8 : 4;
#endif
inline constexpr int kMaxPositions = 16;

// A register tile of the gradient of the weight: kTaps<vectors> values of the input, one for each tap and channel, by
// `vectors` vectors of output channels. Derived as kPositions.
template <int vectors>
inline constexpr int kTaps = kPositions<vectors>;

// The same where the taps of a tile do not lie side by side. Derived: 9 taps of a 3x3 kernel on a single channel, or of
// a row of it on three channels, with at most 2 vectors.
inline constexpr int kListedTaps = 9;
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kMaxListedVectors = 2;
#else
inline constexpr int kMaxListedVectors = 1;
#endif

// Bytes of the weights that one pass over a band of rows multiplies with. Derived: half of an L1 of 48 KiB.
inline constexpr int64_t kPanelBytes = 24 * 1024;

// Bytes of the rearranged input of a band of rows. Chosen: a tenth of L2 in the forward pass, most of L1 in the
// gradient of the weight, which reads it once for each register tile.
inline constexpr int64_t kBandBytes = 128 * 1024;
inline constexpr int64_t kGradBandBytes = 24 * 1024;

// Positions whose statistics are summed in the type of the data, before they join a sum in double. Chosen: the rounding
// of so few sums is below 3e-5 of their spread.
inline constexpr int64_t kSummedPositions = 512;

// Vectors of output channels of a register tile that shares its inputs among three taps. Derived: the weights of three
// taps and 16 sums of 2 vectors take 22 of the 32 registers of AVX-512, and those of 8 sums 14 of the 16 of AVX2.
inline constexpr int kMaxRowVectors = 2;

// Input channels of a register tile of the gradient that shares its inputs among three taps, times its vectors of
// output channels. Derived: 24 sums, the gradients of three taps and an input take at most 31 of the 32 registers of
// AVX-512, or 12 sums 16 of the 16 of AVX2.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kRowChannels = 8;
#else
inline constexpr int kRowChannels = 4;
#endif

// Bytes of the source of a band of Winograd's F(2, 3): it is transformed into twice as many bytes, whose products take
// as many again. Chosen: all fit L2, most of them L1.
inline constexpr int64_t kRowBandBytes = 16 * 1024;

// Tiles that Winograd's algorithm multiplies together. Derived: a multiple of every register tile. For 64 channels in
// float32 the transformed inputs and the products take 16 * 48 * 64 * 4 bytes = 192 KiB each, within L2.
inline constexpr int kTiles = 48;
static_assert(kTiles % kMaxPositions == 0);

// Values between the points of a block of tiles. Derived: a cache line; without it the points of a tile would lie in
// the same set of the first-level cache.
template <typename T>
inline constexpr int64_t kPointGap = 64 / sizeof(T);

// Below so many input channels, the transforms take longer than they save. Chosen: on an AVX-512 Xeon F(2, 3) over rows
// computes "3 -> 32, 32x32" at 0.9 times the speed of the direct algorithm, and "16 -> 16, 32x32" at 1.15 times.
inline constexpr int64_t kMinWinogradChannels = 12;

// With so many vectors of output channels, F(2, 3) over rows is faster than F(2x2, 3x3), which is bound by loads then.
// Chosen: on an AVX-512 Xeon "16 -> 16, 32x32" takes 0.64 times as long, and "32 -> 32, 16x16" 1.03 times.
inline constexpr int64_t kMaxRowVectorsOfWholeInputs = 1;

// The most bytes of transformed weights for which Winograd's algorithm is used. Chosen: an L2.
inline constexpr int64_t kMaxWinogradBytes = int64_t(1) << 21;

// Positions of a part of the gradient of the weight, and the most parts: the sums of each part take memory of the size
// of the weight. The parts do not depend on the number of threads. Chosen.
inline constexpr int64_t kPartPositions = 512;
inline constexpr int64_t kMaxParts = 32;

// Pieces that the forward pass is divided into, if it is large enough: threads take them one at a time. Chosen.
inline constexpr int64_t kPieces = 64;

// Multiply-adds that take as long as packing one weight does. Chosen.
inline constexpr int64_t kPackingMacs = 16;

}  // namespace lightkit::cpu::conv2d
