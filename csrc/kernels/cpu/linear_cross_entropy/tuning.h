// The tuned constants of the fused linear cross-entropy on a CPU, each with its derivation or measurement.
//
// "Chosen" means: set while the kernel was written, on a two-core machine with AVX-512, and not compared with other
// values in benchmarks/results. linear_cross_entropy.csv there compares the kernel, with these constants, to torch.
#pragma once

#include "../common/simd.h"

#include <cstdint>

namespace lightkit::cpu::linear_cross_entropy {

// Classes and rows of a tile of logits. Derived: a tile of 64 x 128 floats is 32 KiB, within L1.
inline constexpr int64_t kTileClasses = 64;
inline constexpr int64_t kTileRows = 128;

// The number of rows in memory is rounded up to this. Derived: whole vectors of every type, 32 elements of bfloat16
// with AVX-512.
inline constexpr int64_t kRowMultiple = 32;

// Sums of exponentials that a row of a tile has at a time. Derived: an addition takes four cycles, and small terms
// would get lost in one long chain with a large one.
inline constexpr int kSumChains = 4;

// Classes whose sum of exponentials is one term of a row's sum: the order of additions then does not depend on who
// computes which term. Chosen: 16 tiles.
inline constexpr int64_t kSumClasses = 1024;

// The fewest rows of a chunk whose logits all stay in memory. Chosen: every chunk reads all weights once, so that fewer
// rows read them too often.
inline constexpr int64_t kMinChunk = 64;

// If the limit cannot keep the exponentials of all classes, a slice of the others gets one part in kSliceShare of the
// limit. Chosen: each slice takes a trip through all hidden states, and each class that is kept instead saves one of
// four products. linear_cross_entropy.csv was measured with a share of 8 and a limit of 64 MiB.
inline constexpr int64_t kSliceShare = 8;

// The fewest classes of a slice. Chosen: four tiles.
inline constexpr int64_t kMinSlice = 256;

// Bytes of the limit that are left for the scratch of threads, at most an eighth of the limit. Derived: two threads of
// up to 2 MiB. The plan, and with it the order of sums, must not depend on the number of threads.
inline constexpr int64_t kScratchBytes = int64_t(4) << 20;
inline constexpr int64_t kScratchShare = 8;

// Terms of a product that one call of tile_gemm adds. Derived: its operands, 128 terms of 256 rows and of 512 columns,
// are 384 KiB in float32, within an L2 of 1 MiB.
inline constexpr int64_t kGemmTerms = 128;

// Terms that are summed before the sum is added to the earlier ones: one long chain of additions would lose digits.
// Half precision has fewer digits to lose. Chosen.
template <typename operand_t>
inline constexpr int64_t kChainTerms = is_half<operand_t> ? 1024 : 256;

// Rows of the gradient of the hidden states that a thread computes at a time; fewer where threads would be idle.
// Chosen.
inline constexpr int64_t kMaxHiddenRows = 256;

// Classes and columns of the gradient of the weight that a thread computes at a time; fewer where threads would be
// idle. Derived: a block of 256 x 512 floats is 512 KiB, within an L2 of 1 MiB.
inline constexpr int64_t kMaxWeightClasses = 256;
inline constexpr int64_t kMaxColumns = 512;
inline constexpr int64_t kMinColumns = 64;

// The fewest rows of the hidden gradient for which a thread is woken to round them. Chosen.
inline constexpr int64_t kConvertedRows = 16;

// Parts of a product that each thread gets, at least, before parts are made smaller. Chosen.
inline constexpr int64_t kPartsPerThread = 2;

}  // namespace lightkit::cpu::linear_cross_entropy
