// Cross-entropy of rows that one or more threads share, each taking every so many packs of 16 bytes.
//
// A row that fits is read once and kept in registers until its gradient is written: of up to 64 packs, by the
// lanes of a part of a warp, two packs a lane; of more, by one to sixteen warps, eight packs a lane; of more
// still, by the blocks of a cluster (cross_entropy_cluster.cuh). What fits nowhere is read twice.
#pragma once

#include "cross_entropy_row.cuh"
#include "reduce.cuh"

#include <cstring>
#include <type_traits>

namespace lightkit::cuda {

constexpr int kBlockThreads = 256;
constexpr int kWideThreads = 512;
constexpr int kMaxCluster = 16;
constexpr int kMaxWarps = kWideThreads / 32 * kMaxCluster;

constexpr int kNarrowPacks = 2;
constexpr int kWidePacks = 8;
constexpr int kStreamedPacks = 4;

// Blocks of kWideThreads that a multiprocessor should hold, so that one loads while another computes.
template <typename scalar_t, bool plain>
constexpr int kResident = plain && sizeof(accumulator_t<scalar_t>) == 4 ? 2 : 1;

// The threads that share a row.
struct Team {
  int thread;
  int threads;
};

// The classes of a row as packs on 16-byte boundaries, with less than a pack over at both ends. Those single
// classes go to the first threads, one each.
template <typename scalar_t, int width, typename index_t>
struct Span {
  index_t head;
  index_t packs;
  index_t singles;

  __device__ __forceinline__ Span(const scalar_t* begin, index_t classes) {
    const auto past = static_cast<index_t>(reinterpret_cast<uintptr_t>(begin) / sizeof(scalar_t) % width);
    head = min((width - past) % width, classes);
    packs = (classes - head) / width;
    singles = classes - packs * width;
  }
  __device__ __forceinline__ index_t first_of(index_t pack) const { return head + pack * width; }
  // The class of a thread outside the packs, or -1.
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

// The merge of `count` (a power of 2) entries that the warps of a team have left in shared memory. Each warp
// merges all of them, and gets the same bits.
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

// Hides from the compiler that a pack of half-precision values still is what it was. It would otherwise keep the
// widened values from one use to the next, in twice the registers.
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

// Merges the normalizers of the blockDim.x threads of a block that share a row. All of them get the result.
template <typename acc_t>
__device__ __forceinline__ Normalizer<acc_t> merge_team(
    Normalizer<acc_t> value, Normalizer<acc_t>* entries, bool has_soft) {
  const int threads = static_cast<int>(blockDim.x);
  // Where the gradient takes the logits' place, all lanes have read the target's logit before one overwrites it.
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

// The share of one thread in a row: `merge` makes the normalizer of the row from those of the team's threads.
// `width` is that of a pack, or 1 where logits and gradient do not lie alike. All threads of a warp must come
// here, also for a row that does not exist.
template <typename scalar_t, bool plain, int width, int packs, bool held, typename Merge>
__device__ __forceinline__ void share_row(const CrossEntropyRows& args, int64_t index, Team team, const Merge& merge) {
  using acc_t = accumulator_t<scalar_t>;
  using pack_t = Pack<scalar_t, width>;
  const int64_t offset = index < args.rows ? index * args.classes : 0;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + offset;
  Row<scalar_t, plain> row(args, index, logits);
  // A row that is held is short, and its places are counted in 32 bits.
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
  // Once, if the row is held.
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
  // After the pack that holds it, by the same thread.
  if (row.counts && row.by_index() && span.owner(static_cast<index_t>(row.target), team.threads) == team.thread) {
    gradient[row.target] = narrow<scalar_t>(row.at_target);
  }
}

// blockDim = (threads a row, rows a block).
template <typename scalar_t, bool plain, int width, int packs, bool held>
__global__ void __launch_bounds__(kWideThreads, kResident<scalar_t, plain>)
rows_kernel(const __grid_constant__ CrossEntropyRows args) {
  using acc_t = accumulator_t<scalar_t>;
  __shared__ Normalizer<acc_t> entries[kWideThreads / 32];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const Team team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  share_row<scalar_t, plain, width, packs, held>(args, index, team, [&](const Normalizer<acc_t>& local, bool has_soft) {
    return merge_team(local, entries, has_soft);
  });
}

template <typename scalar_t, bool plain, int width, int packs, bool held>
void launch_rows(const CrossEntropyRows& args, int threads, cudaStream_t stream) {
  const dim3 block(threads, std::max(1, kBlockThreads / threads));
  const auto blocks = static_cast<unsigned>((args.rows + block.y - 1) / block.y);
  rows_kernel<scalar_t, plain, width, packs, held><<<blocks, block, 0, stream>>>(args);
}

}  // namespace lightkit::cuda
