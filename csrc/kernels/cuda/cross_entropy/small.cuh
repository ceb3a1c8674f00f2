// Cross-entropy of short rows: a block copies a tile of rows, which is contiguous for any number of classes, through
// shared memory, where each thread works on one row.
//
// It serves rows whose packs are not on 16-byte boundaries, and problems so small that one block does everything, with
// the sums over all rows, in one launch.
#pragma once

#include "../../common/ceil_div.h"
#include "reduce.cuh"
#include "row.cuh"
#include "tuning.h"

namespace lightkit::cuda::cross_entropy {

// Copies an array, in packs if both begin on a 16-byte boundary. All threads of a block call it.
template <typename scalar_t>
__device__ void copy_tile(
    const scalar_t* from,  // [count]
    scalar_t* to,          // [count]
    int count) {
  int packed = 0;
  if (is_aligned(from) && is_aligned(to)) {
    packed = count / Pack<scalar_t>::size;
    for (int i = threadIdx.x; i < packed; i += kTileRows) {
      reinterpret_cast<Pack<scalar_t>*>(to)[i] = reinterpret_cast<const Pack<scalar_t>*>(from)[i];
    }
    packed *= Pack<scalar_t>::size;
  }
  for (int i = packed + static_cast<int>(threadIdx.x); i < count; i += kTileRows) {
    to[i] = from[i];
  }
}

// Works on one row with one thread. The gradient replaces the logits in `values` [classes].
template <typename scalar_t, bool plain>
__device__ void work_on_row(const Rows& args, int64_t index, scalar_t* values, accumulator_t<scalar_t> scale) {
  using acc_t = accumulator_t<scalar_t>;
  const int classes = static_cast<int>(args.classes);
  Row<scalar_t, plain> row(args, index, values);
  row.scale = scale;
  auto norm = Normalizer<acc_t>::none();
  if (row.counts) {
    acc_t largest = lowest<acc_t>();
    for (int c = 0; c < classes; ++c) {
      largest = fmax(largest, widen<acc_t>(values[c]));
    }
    row.raise(largest, norm);
    for (int c = 0; c < classes; ++c) {
      row.absorb(widen<acc_t>(values[c]), c, norm);
    }
  }
  row.finish(norm, /*writes=*/true);
  if (args.gradient != nullptr) {
    for (int c = 0; c < classes; ++c) {
      values[c] = row.counts ? row.gradient(widen<acc_t>(values[c]), c) : narrow<scalar_t>(acc_t(0));
    }
    if (row.counts && row.by_index()) {
      values[row.target] = narrow<scalar_t>(row.at_target);
    }
  }
}

// With `alone`, one block works on all rows.
template <typename scalar_t, bool plain, bool alone>
__global__ void __launch_bounds__(kTileRows) tile_kernel(const __grid_constant__ Rows args) {
  using acc_t = accumulator_t<scalar_t>;
  extern __shared__ uint4 tile_memory[];
  auto* tile = reinterpret_cast<scalar_t*>(tile_memory);

  double denominator = 1;
  if constexpr (alone) {
    const double weights =
        args.target == nullptr ? static_cast<double>(args.rows) : check_targets<acc_t>(args, 0, args.rows);
    denominator = args.mean ? weights : 1.0;
  } else if (args.mean && args.gradient != nullptr) {
    denominator = mean_denominator(args);
  }
  const auto scale = static_cast<acc_t>(1.0 / denominator);

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * kTileRows) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(kTileRows), args.rows - first));
    const int count = rows * static_cast<int>(args.classes);
    const int64_t offset = first * args.classes;
    copy_tile(static_cast<const scalar_t*>(args.logits) + offset, tile, count);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      scalar_t* values = tile + threadIdx.x * static_cast<int>(args.classes);
      work_on_row<scalar_t, plain>(args, first + threadIdx.x, values, scale);
    }
    __syncthreads();
    if (args.gradient != nullptr) {
      copy_tile(tile, static_cast<scalar_t*>(args.gradient) + offset, count);
      __syncthreads();
    }
  }
  if constexpr (alone) {
    if (args.total != nullptr) {
      const double sum = sum_losses<acc_t>(args, 0, args.rows);
      if (threadIdx.x == 0) {
        write_total(args, sum / denominator);
      }
    }
  }
}

template <typename scalar_t, bool plain>
void launch_tiles(const Rows& args, bool alone, cudaStream_t stream) {
  const size_t shared = kTileRows * args.classes * sizeof(scalar_t);
  if (alone) {
    tile_kernel<scalar_t, plain, true><<<1, kTileRows, shared, stream>>>(args);
  } else {
    const auto blocks = static_cast<unsigned>(ceil_div(args.rows, kTileRows));
    tile_kernel<scalar_t, plain, false><<<blocks, kTileRows, shared, stream>>>(args);
  }
}

}  // namespace lightkit::cuda::cross_entropy
