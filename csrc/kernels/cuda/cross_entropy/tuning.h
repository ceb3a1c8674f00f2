// The tuned constants of cross-entropy on a GPU, each with its derivation or measurement.
//
// "Chosen" means: set while the kernels were written, on an H100, and not compared with other values in
// benchmarks/results. cross_entropy.csv there compares the kernels, with these constants, to torch and to the time of a
// copy.
#pragma once

#include <cstdint>

namespace lightkit::cuda::cross_entropy {

// Rows of a tile in shared memory, one a thread, and the widest row. Derived: 128 rows of 256 bytes are 32 KiB, within
// the 48 KiB that a block gets without asking.
constexpr int kTileRows = 128;
constexpr int64_t kTileRowBytes = 256;

// Up to this many rows, one block does everything in one launch. Chosen: four tiles, one after the other.
constexpr int64_t kAloneRows = 4 * kTileRows;

// Threads of a block for rows that need fewer, and the most threads that share a row in a block. Chosen.
constexpr int kBlockThreads = 256;
constexpr int kWideThreads = 512;

// The most blocks of a cluster. Derived: 16 is the largest cluster that a device of compute capability 9.0 can be asked
// for.
constexpr int kMaxCluster = 16;
constexpr int kMaxWarps = kWideThreads / 32 * kMaxCluster;

// Packs of 16 bytes that a thread holds of a row: of a narrow row, of a wide row, and of a row that is read twice.
// Derived: 8 packs of float are 32 of the 64 registers that two resident blocks of 512 threads leave to a thread.
constexpr int kNarrowPacks = 2;
constexpr int kWidePacks = 8;
constexpr int kStreamedPacks = 4;

// Threads of a block that sums over rows, and the rows for which another block is worth a launch. Chosen.
constexpr int kSumThreads = 256;
constexpr int64_t kRowsPerPart = 2048;

// Threads of a block that scales gradients, and the most blocks. Derived: 2048 blocks of 256 threads fill any device;
// with a factor of 1 no other block is paid for.
constexpr int kScaleThreads = 256;
constexpr int64_t kMaxScaleBlocks = 2048;

}  // namespace lightkit::cuda::cross_entropy
