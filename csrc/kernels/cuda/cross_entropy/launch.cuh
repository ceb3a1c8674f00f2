// The choice of the kernels of a cross-entropy. A file for each element type instantiates it, so that compilers work on
// them in parallel.
#pragma once

#include "cluster.cuh"
#include "cross_entropy.h"
#include "reduce.cuh"
#include "small.cuh"
#include "wide.cuh"

namespace lightkit::cuda::cross_entropy {

// The alignment of the rows to packs.
template <typename scalar_t>
struct Layout {
  static constexpr int width = Pack<scalar_t>::size;
  bool alike;    // a class has the same place in its pack in the logits and in the gradient
  bool aligned;  // every row begins with a pack

  explicit Layout(const Rows& args) {
    const auto logits = reinterpret_cast<uintptr_t>(args.logits);
    const auto gradient = args.gradient == nullptr ? logits : reinterpret_cast<uintptr_t>(args.gradient);
    alike = (logits - gradient) % 16 == 0;
    aligned = alike && logits % 16 == 0 && args.classes % width == 0;
  }
};

// Returns the smallest power of 2 in [from, to] that gives each thread at most `packs` of all packs; else `to`.
inline int threads_for(int64_t all, int packs, int from, int to) {
  int threads = from;
  while (threads < to && static_cast<int64_t>(threads) * packs < all) {
    threads *= 2;
  }
  return threads;
}

template <typename scalar_t, bool plain>
cudaError_t launch_typed_rows(const Rows& args, cudaStream_t stream) {
  using layout_t = Layout<scalar_t>;
  constexpr int width = layout_t::width;
  const layout_t layout(args);
  const int64_t packs = args.classes / width;
  if (!layout.aligned && args.classes * static_cast<int64_t>(sizeof(scalar_t)) <= kTileRowBytes) {
    launch_tiles<scalar_t, plain>(args, /*alone=*/false, stream);
  } else if (!layout.alike) {
    // Too rare for a plain variant.
    launch_rows<scalar_t, false, 1, kStreamedPacks, false>(
        args, threads_for(args.classes, kStreamedPacks, 32, kWideThreads), stream);
  } else if (packs <= 32 * kNarrowPacks) {
    // Two packs get at least two threads, which fill a sector of 32 bytes together.
    const int from = layout.aligned ? static_cast<int>(std::min<int64_t>(packs, 2)) : 32;
    launch_rows<scalar_t, plain, width, kNarrowPacks, true>(args, threads_for(packs, kNarrowPacks, from, 32), stream);
  } else if (packs <= kWideThreads * kWidePacks) {
    launch_rows<scalar_t, plain, width, kWidePacks, true>(
        args, threads_for(packs, kWidePacks, 32, kWideThreads), stream);
  } else {
    const int size = threads_for(packs, kWideThreads * kWidePacks, 2, kMaxCluster);
    const bool fits = packs <= static_cast<int64_t>(size) * kWideThreads * kWidePacks && args.rows < (int64_t{1} << 26);
    if (fits && size <= largest_cluster<scalar_t, plain>()) {
      return launch_clusters<scalar_t, plain>(args, size, stream);
    }
    launch_rows<scalar_t, plain, width, kStreamedPacks, false>(args, kWideThreads, stream);
  }
  return cudaGetLastError();
}

template <typename scalar_t, bool plain>
cudaError_t launch(const Rows& args, cudaStream_t stream) {
  const int64_t row_bytes = args.classes * static_cast<int64_t>(sizeof(scalar_t));
  if (args.rows <= kAloneRows && row_bytes > 0 && row_bytes <= kTileRowBytes) {
    launch_tiles<scalar_t, plain>(args, /*alone=*/true, stream);
    return cudaGetLastError();
  }
  const int parts = parts_of(args.rows);
  if (args.target != nullptr || parts > 1) {
    prepare_kernel<scalar_t><<<parts, kSumThreads, 0, stream>>>(args);
  }
  if (args.rows > 0 && args.classes > 0) {
    if (const auto error = launch_typed_rows<scalar_t, plain>(args, stream); error != cudaSuccess) {
      return error;
    }
  }
  if (args.total != nullptr) {
    total_kernel<scalar_t><<<parts, kSumThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

// `run` for one element type.
template <typename scalar_t>
cudaError_t run_as(const Rows& args, cudaStream_t stream) {
  const bool plain = args.target != nullptr && args.smoothing == 0 && args.softcap == 0;
  return plain ? launch<scalar_t, true>(args, stream) : launch<scalar_t, false>(args, stream);
}

}  // namespace lightkit::cuda::cross_entropy
