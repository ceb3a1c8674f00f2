// The tuned constants of the optimizers on a GPU, each with its derivation.
//
// "Chosen" means: set while the kernels were written, on an H100, and not compared with other values in
// benchmarks/results. sgd.csv and adam.csv there compare the kernels, with these constants, to torch and to a copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightkit::cuda::optim {

// Threads of a block. Chosen.
constexpr int kStepThreads = 256;
constexpr int kNormThreads = 256;

// Parameters of one launch. Derived: as many as fit the 32764 bytes of a kernel's arguments since CUDA 12.1 with every
// algorithm's options.
constexpr int kTensorsPerLaunch = 96;
constexpr size_t kMaxArgumentBytes = 32764;

// Gradients, and counters, of one launch. Derived: as many as fit 4 KiB of a kernel's arguments.
constexpr int kGradientsPerLaunch = 160;
constexpr int kCountsPerLaunch = 500;

// A block works on one chunk of one parameter. Chunks are so small that there are kWantedBlocks blocks, if the sizes
// allow it: one large parameter alone then fills the device. Chosen.
constexpr int64_t kWantedBlocks = 1024;
constexpr int64_t kSmallestChunk = 2048;
constexpr int64_t kLargestChunk = 65536;

// Elements whose squares are one term of the norm: the order of additions does not depend on the device. Chosen.
constexpr int64_t kNormRun = 16384;

}  // namespace lightkit::cuda::optim
