// The tuned constants of the layer chain on a CPU, each with its derivation or measurement.
//
// "Chosen" means: set while the kernel was written, on an AVX-512 Xeon (48 KiB of L1 and 2 MiB of L2 a core), and not
// compared with other values in benchmarks/results. conv_relu_pool.csv there compares the kernels, with these
// constants, to torch.
#pragma once

#include "../common/winograd.h"
#include "shape.h"

#include <algorithm>
#include <cstdint>

namespace lightkit::cpu::layer_chain {

// A register tile of the forward pass: kPositions positions by kVectors vectors of output channels. Derived: its sums,
// kVectors weights and one broadcast input take 6 * 4 + 4 + 1 = 29 of the 32 registers of AVX-512, or 6 * 2 + 2 + 1 =
// 15 of the 16 of AVX2.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = 2;
#endif
inline constexpr int kPositions = 6;

// Positions of a block of the direct convolution. Derived: a multiple of a tile and of a window, whose sums (24 * 4
// vectors of 64 bytes = 6 KiB) leave most of L1 to the weights.
inline constexpr int kBlockPositions = 24;
static_assert(kBlockPositions % kPositions == 0 && kBlockPositions % 4 == 0);

// Vectors of output channels of the kernel for a single input channel. Derived: 9 weights and 4 sums of 2 vectors and
// one input take 27 of 32 registers; of 1 vector, 14 of 16.
inline constexpr int kSingleChannelVectors = kVectors / 2;

// Windows of the kernel for one vector of output channels. Derived: their sums, four weights and one input take 4 * 3 +
// 4 + 1 = 17 of 32 registers, or 4 * 2 + 4 + 1 = 13 of 16, and at least eight multiply-adds are under way, two for each
// cycle of their latency.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kWindows = 3;
#else
inline constexpr int kWindows = 2;
#endif

// Pairs of windows of the kernel for half a vector of output channels. Derived as kWindows; rows of 14 windows, as of
// images of 32 x 32 behind a 5x5 kernel, fill more of tiles of 4.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kPairs = 4;
#else
inline constexpr int kPairs = 2;
#endif

// The most bytes of a row of inputs that two windows share a vector for. Derived: the six rows that a 5x5 kernel reads
// then take 576 KiB of an L2 of 2 MiB.
inline constexpr int64_t kMaxPairedRowBytes = 96 * 1024;

// Returns true if two windows of a pooled kernel share a vector.
template <typename T>
bool windows_are_paired(const Shape& shape) {
  return shape.pool && 2 * shape.out_channels <= kWidth<T> && shape.columns() >= 2 &&
      shape.row_size() * kWidth<T> * static_cast<int64_t>(sizeof(T)) <= kMaxPairedRowBytes;
}

// Winograd tiles that are multiplied together. Derived: two register tiles. For 64 channels in float32 with AVX-512 the
// transformed inputs and the products take 16 * 12 * 64 * 4 bytes = 48 KiB each, within L2.
inline constexpr int kWinogradTiles = 2 * kPositions;
static_assert(kWinogradTiles % kPositions == 0, "a last register tile would overrun the buffers of a block");

// The most bytes of transformed weights for which Winograd's algorithm is used. Derived: half of an L2 of 2 MiB. In
// conv_relu_pool.csv "64 -> 128, 16x16, padded, pool" (512 KiB) is computed with it and "256 -> 256, 8x8, padded, pool"
// (4 MiB) without it; the limit itself was not measured.
inline constexpr int64_t kMaxWinogradWeightBytes = int64_t(1) << 20;

// Returns true if the forward pass uses Winograd's algorithm: for pooled 3x3 kernels on whole vectors of input
// channels, whose transformed weights fit `kMaxWinogradWeightBytes`.
template <typename T>
bool winograd_applies(const Shape& shape) {
  return shape.pool && shape.kernel_height == 3 && shape.kernel_width == 3 && shape.in_channels % kWidth<T> == 0 &&
      shape.in_channels * shape.out_channels * winograd::kPoints * static_cast<int64_t>(sizeof(T)) <=
      kMaxWinogradWeightBytes;
}

// Vectors of sums that the gradients keep in registers, beside a coefficient and a factor. Derived: 32 registers of
// AVX-512, 16 of AVX2, with some to spare.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kHeldVectors = 24;
#else
inline constexpr int kHeldVectors = 12;
#endif

// Rows and columns of the kernel that one pass of the gradient of the input sums. Derived: with a pool a 3x3 part has
// 16 sums, a 3x5 part 24.
inline constexpr int kMaxPartRows = 3;
inline constexpr int kMaxPartColumns = 5;

// Outputs, and channels of each, whose lists the gradient of the input makes together. Chosen; a 3x3 part of 64
// channels has 36 KiB of weights in float32, within L1.
inline constexpr int64_t kListedOutputs = 32;
inline constexpr int64_t kListedChannels = 64;

// Rows of a patch, and vectors of each, that one pass of the gradient of the weight sums. Derived: 3 rows of 8 vectors,
// or 2 of 12, are kHeldVectors.
inline constexpr int kMaxSegmentRows = 3;
inline constexpr int kMaxSegmentVectors = 12;

// Output channels whose lists the gradient of the weight makes together, and the most outputs that they list. Chosen: 8
// channels of float32 are half of a cache line; 128 entries of 8 lists take 8 KiB.
inline constexpr int kListChannels = 8;
inline constexpr int64_t kMaxListOutputs = 128;

// The items of a gradient of the weight with few groups of channels: parts of the images are summed apart, so that
// threads share the work. Chosen: two threads then differ by at most a sixteenth.
inline constexpr int64_t kListItems = 16;

// Returns the number of parts of the images. It does not depend on the number of threads: the order of additions must
// not. A part has full lists at least.
inline int64_t image_parts(const Shape& shape, int64_t groups, int64_t images) {
  const int64_t lists = images * shape.positions() / kMaxListOutputs;
  return std::clamp<int64_t>(std::min(kListItems / groups, lists), 1, images);
}

// Bytes of input for which lists are made at a time. Derived: half of an L1 of 48 KiB.
inline constexpr int64_t kCachedInputBytes = 24 * 1024;

// Rows and taps of the kernel that one pass of the few-channels gradient of the weight sums. Derived: 9 sums, 4
// gradients, their total and one input take 15 of 16 registers.
inline constexpr int kMaxTapRows = 3;
inline constexpr int kMaxTaps = 3;

// The few-channels gradient sums the images in so many parts, whatever the number of threads: the order of additions
// must not depend on it. Chosen: it is the most threads that one layer's gradient can use.
inline constexpr int64_t kImageParts = 16;

// The most sums of one part. Derived: 16 parts of 2^20 floats are 64 MiB.
inline constexpr int64_t kMaxPartSums = int64_t(1) << 20;

// Returns true if the few-channels gradient of the weight should be faster than lists. It multiplies a whole window,
// zeros included, by `run` inputs, and fills every lane; lists multiply one position, and leave lanes empty if `run` is
// short. An estimate: "1 -> 32" (4 * 3 taps) and "3 -> 32" (4 * 9) lie on its two sides with AVX-512 in float32; the
// factor 3/2 was chosen.
template <typename T>
bool has_few_channels(const Shape& shape) {
  return shape.taps() * round_up(shape.out_channels, kWidth<T>) <= kMaxPartSums &&
      shape.window() * shape.run() * 2 <= 3 * kWidth<T>;
}

// Bytes of activations that a thread works on at a time. Chosen: a quarter of an L2 of 2 MiB; the rest holds weights.
inline constexpr int64_t kSliceBytes = 512 * 1024;

// Pieces of the images that each thread starts with, if there are so many. Chosen: a thread that is slowed down by
// another process gives up to three quarters of its work away.
inline constexpr int64_t kPiecesPerThread = 4;

// Multiply-adds that take as long as packing one weight does, or as adding up the parts of its gradient. Measured: on
// an AVX-512 Xeon a thread packs 2 weights in a nanosecond, and adds 30 to 80 products.
inline constexpr int64_t kPackingMacs = 16;

}  // namespace lightkit::cpu::layer_chain
