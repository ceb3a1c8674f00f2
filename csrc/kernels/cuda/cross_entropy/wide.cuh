// Cross-entropy of rows that a team of threads shares: each thread works on every n-th pack of 16 bytes.
//
// A row that fits the registers of its team is read once, and kept until its gradient is written. A row of up to 64
// packs has a part of a warp, with two packs a lane; a wider row has one to sixteen warps, with eight packs a lane; a
// still wider row has a cluster of blocks (cluster.cuh). A row that fits no team is read twice.
#pragma once

#include "../../common/ceil_div.h"
#include "reduce.cuh"
#include "row.cuh"
#include "tuning.h"

#include <cstring>
#include <type_traits>

namespace lightkit::cuda::cross_entropy {

// Blocks of kWideThreads that a multiprocessor should hold: with two, one loads while the other computes.
template <typename scalar_t, bool plain>
constexpr int kResident = plain && sizeof(accumulator_t<scalar_t>) == 4 ? 2 : 1;

// The threads that share a row.
struct Team {
  int thread;
  int threads;
};

// The classes of a row as packs on 16-byte boundaries, with less than a pack left over at each end. The first threads
// take one of the left-over classes each.
template <typename scalar_t, int width, typename index_t>
struct Span {
  index_t head;  // left-over classes before the packs
  index_t packs;
  index_t singles;  // left-over classes at both ends

  __device__ __forceinline__ Span(const scalar_t* begin, index_t classes) {
    const auto past = static_cast<index_t>(reinterpret_cast<uintptr_t>(begin) / sizeof(scalar_t) % width);
    head = min((width - past) % width, classes);
    packs = (classes - head) / width;
    singles = classes - packs * width;
  }
  __device__ __forceinline__ index_t first_of(index_t pack) const {
    return head + pack * width;
  }
  // The left-over class of a thread, or -1.
  __device__ __forceinline__ index_t single(int thread) const {
    return thread >= singles ? -1 : thread < head ? thread : packs * width + thread;
  }
  // The thread that writes a class.
  __device__ __forceinline__ index_t owner(index_t c, int threads) const {
    if (c < head) {
      return c;
    }
    const index_t pack = (c - head) / width;
    return pack < packs ? pack % threads : c - packs * width;
  }
};

// Merges the normalizers of `lanes` lanes of a warp.
template <typename acc_t>
__device__ __forceinline__ Normalizer<acc_t> merge_lanes(Normalizer<acc_t> value, int lanes, bool has_soft) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    auto other = Normalizer<acc_t>::none();
    other.maximum = __shfl_xor_sync(kFullMask, value.maximum, offset);
    other.sum = __shfl_xor_sync(kFullMask, value.sum, offset);
    if (has_soft) {
      other.soft_sum = __shfl_xor_sync(kFullMask, value.soft_sum, offset);
      other.offset = __shfl_xor_sync(kFullMask, value.offset, offset);
    }
    value.merge(other);
  }
  return value;
}

// Merges `count` (a power of 2) entries of a team's warps in shared memory. Each warp merges all entries, and gets the
// same bits.
template <typename acc_t>
__device__ __forceinline__ Normalizer<acc_t> merge_entries(const Normalizer<acc_t>* entries, int count, bool has_soft) {
  const int lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const int lanes = min(count, 32);
  Normalizer<acc_t> value = entries[lane % lanes];
  for (int i = lane % lanes + lanes; i < count; i += lanes) {
    value.merge(entries[i]);
  }
  return merge_lanes(value, lanes, has_soft);
}

// Hides from the compiler that a half-precision pack has not changed. Otherwise the compiler would keep the widened
// values from one use to the next, in twice the registers.
template <typename scalar_t, int size>
__device__ __forceinline__ void keep_narrow(Pack<scalar_t, size>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(scalar_t) == 2 && size > 1) {
    unsigned words[size / 2];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < size / 2; ++i) {
      asm volatile("" : "+r"(words[i]));
    }
    memcpy(&pack, words, sizeof(pack));
  }
#endif
}

// Merges the normalizers of the blockDim.x threads that share a row, and returns the result to each of them.
template <typename acc_t>
__device__ __forceinline__ Normalizer<acc_t> merge_team(
    Normalizer<acc_t> value, Normalizer<acc_t>* entries, bool has_soft) {
  const int threads = static_cast<int>(blockDim.x);
  // If the gradient replaces the logits, all lanes have read the target's logit before one overwrites it.
  __syncwarp();
  value = merge_lanes(value, min(threads, 32), has_soft);
  if (threads > 32) {
    Normalizer<acc_t>* own = entries + threadIdx.y * (threads / 32);
    if (threadIdx.x % 32 == 0) {
      own[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = merge_entries(own, threads / 32, has_soft);
  }
  return value;
}

// One thread's share of a row. merge(normalizer, has_soft) makes the normalizer of the row from those of the team's
// threads. `width` is the size of a pack, or 1 if logits and gradient are not aligned alike. All threads of a warp call
// it, also for a row that does not exist.
template <typename scalar_t, bool plain, int width, int packs, bool held, typename Merge>
__device__ __forceinline__ void share_row(const Rows& args, int64_t index, Team team, const Merge& merge) {
  using acc_t = accumulator_t<scalar_t>;
  using pack_t = Pack<scalar_t, width>;
  const int64_t offset = index < args.rows ? index * args.classes : 0;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + offset;
  Row<scalar_t, plain> row(args, index, logits);
  // A row that is held is short enough for 32-bit indices.
  using index_t = std::conditional_t<held, int, int64_t>;
  const Span<scalar_t, width, index_t> span(logits, static_cast<index_t>(args.classes));
  const index_t single = row.counts ? span.single(team.thread) : -1;
  const index_t stride = static_cast<index_t>(team.threads) * packs;

  pack_t kept[packs];
  const auto load = [&](index_t first) {
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const index_t pack = first + p * team.threads;
      if (pack < span.packs) {
        kept[p] = *reinterpret_cast<const pack_t*>(logits + span.first_of(pack));
      }
    }
  };

  auto local = Normalizer<acc_t>::none();
  scalar_t alone{};
  if (single >= 0) {
    alone = logits[single];
    row.raise(widen<acc_t>(alone), local);
    row.absorb(widen<acc_t>(alone), single, local);
  }
  // A held row takes one iteration.
  for (index_t first = team.thread; row.counts && first < span.packs; first += stride) {
    load(first);
    acc_t largest = lowest<acc_t>();
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (first + p * team.threads < span.packs) {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          largest = fmax(largest, widen<acc_t>(kept[p].values[k]));
        }
      }
    }
    row.raise(largest, local);
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const index_t pack = first + p * team.threads;
      if (pack < span.packs) {
        keep_narrow(kept[p]);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          row.absorb(widen<acc_t>(kept[p].values[k]), span.first_of(pack) + k, local);
        }
      }
    }
    if constexpr (held) {
      break;
    }
  }
  if (args.mean && args.gradient != nullptr) {
    row.scale = static_cast<acc_t>(1.0 / mean_denominator(args));
  }
  const Normalizer<acc_t> norm = merge(local, row.has_soft());
  if (index >= args.rows) {
    return;
  }
  row.finish(norm, /*writes=*/team.thread == 0);
  if (args.gradient == nullptr) {
    return;
  }

  scalar_t* gradient = static_cast<scalar_t*>(args.gradient) + offset;
  for (index_t first = team.thread; first < span.packs; first += stride) {
    if (!held && row.counts) {
      load(first);
    }
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const index_t pack = first + p * team.threads;
      if (pack < span.packs) {
        keep_narrow(kept[p]);
        pack_t out;
#pragma unroll
        for (int k = 0; k < width; ++k) {
          out.values[k] = row.counts ? row.gradient(widen<acc_t>(kept[p].values[k]), span.first_of(pack) + k)
                                     : narrow<scalar_t>(acc_t(0));
        }
        *reinterpret_cast<pack_t*>(gradient + span.first_of(pack)) = out;
      }
    }
    if constexpr (held) {
      break;
    }
  }
  if (const index_t c = span.single(team.thread); c >= 0) {
    gradient[c] = row.counts ? row.gradient(widen<acc_t>(alone), c) : narrow<scalar_t>(acc_t(0));
  }
  // The thread that wrote the target's pack overwrites the target.
  if (row.counts && row.by_index() && span.owner(static_cast<index_t>(row.target), team.threads) == team.thread) {
    gradient[row.target] = narrow<scalar_t>(row.at_target);
  }
}

// blockDim = (threads a row, rows a block).
template <typename scalar_t, bool plain, int width, int packs, bool held>
__global__ void __launch_bounds__(kWideThreads, kResident<scalar_t, plain>)
    rows_kernel(const __grid_constant__ Rows args) {
  using acc_t = accumulator_t<scalar_t>;
  __shared__ Normalizer<acc_t> entries[kWideThreads / 32];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const Team team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  share_row<scalar_t, plain, width, packs, held>(args, index, team, [&](const Normalizer<acc_t>& local, bool has_soft) {
    return merge_team(local, entries, has_soft);
  });
}

template <typename scalar_t, bool plain, int width, int packs, bool held>
void launch_rows(const Rows& args, int threads, cudaStream_t stream) {
  const dim3 block(threads, std::max(1, kBlockThreads / threads));
  const auto blocks = static_cast<unsigned>(ceil_div(args.rows, block.y));
  rows_kernel<scalar_t, plain, width, packs, held><<<blocks, block, 0, stream>>>(args);
}

}  // namespace lightkit::cuda::cross_entropy
