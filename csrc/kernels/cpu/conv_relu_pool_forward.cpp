// The forward pass: a direct convolution in registers, pooled before anything is stored.
//
// A tile is kPositions positions by kVectors vectors of output channels, all of whose sums stay in registers: for
// each input that a position reads, one broadcast and kVectors multiply-adds. A block of tiles then fills a buffer
// in the first-level cache, from which ReLU and pool write the output.

#include "conv_relu_pool.h"

#include <ATen/Parallel.h>
#include <c10/util/Unroll.h>

#include <type_traits>

namespace lightkit::cpu {
namespace {

// Sums, weights and one broadcast fit the 32 registers of AVX-512 or the 16 of AVX2.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kPositions = 6;

// Positions of a block: the weights of kVectors vectors are read from the first-level cache for all of them.
constexpr int kBlock = 24;
static_assert(kBlock % kPositions == 0 && kBlock % 4 == 0);

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr int kWidth = Vec<T>::size();

// sums[p] = bias + the products of one position; weights lie as (kernel_height, run, vectors).
template <typename T, int vectors>
void convolve(
    const ConvReluPoolShape& shape, const T* const (&inputs)[kPositions], const T* weight, const T* bias, T* sums) {
  constexpr int width = kWidth<T>;
  const int64_t run = shape.run();
  const int64_t row_size = shape.row_size();
  const T* x[kPositions];
  std::copy_n(inputs, kPositions, x);
  Vec<T> sum[kPositions][vectors];
  LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      sum[p][v] = Vec<T>::loadu(bias + v * width);
    }
  }
  for (int64_t row = 0; row < shape.kernel_height; ++row) {
    for (int64_t i = 0; i < run; ++i) {
      Vec<T> w[vectors];
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        w[v] = Vec<T>::loadu(weight + v * width);
      }
      weight += vectors * width;
      LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
        const Vec<T> value(x[p][i]);
        LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
          sum[p][v] = at::vec::fmadd(value, w[v], sum[p][v]);
        }
      }
    }
    LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
      x[p] += row_size;
    }
  }
  LIGHTKIT_UNROLL for (int p = 0; p < kPositions; ++p) {
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      sum[p][v].store(sums + (p * vectors + v) * width);
    }
  }
}

// ReLU, and the pool over `quads` positions, of one vector of channels; `stride` from position to position.
template <typename T, int quads>
void finish(const T* sums, int64_t stride, T* output, uint8_t* index, int64_t count) {
  using Values = Lanes<T>;
  using Numbers = LaneNumbers<T>;
  Values best = load_lanes<Values>(sums);
  Numbers winner{};
  LIGHTKIT_UNROLL for (int q = 1; q < quads; ++q) {
    const Values value = load_lanes<Values>(sums + q * stride);
    // The second is for NaN.
    const auto wins = (value > best) | (value != value);
    best = wins ? value : best;
    winner = wins ? Numbers{} + q : winner;
  }
  // NaN is not below 0: it goes on.
  const auto dead = best <= Values{};
  store_lanes(dead ? Values{} : best, output, count);
  if (index != nullptr) {
    store_lanes(__builtin_convertvector(dead ? Numbers{} + kDead : winner, LaneBytes<T>), index, count);
  }
}

// Weight and bias as `convolve` reads them: for each kVectors vectors of output channels one block, the lanes
// without a channel 0.
template <typename T>
class PackedWeight {
 public:
  PackedWeight(const ConvReluPoolShape& shape, const T* weight, const T* bias)
      : taps_(shape.taps()),
        vectors_((shape.out_channels + kWidth<T> - 1) / kWidth<T>),
        weight_(vectors_ * kWidth<T> * taps_),
        bias_(vectors_ * kWidth<T>) {
    at::parallel_for(0, vectors_, conv_grain(kPackingCost * kWidth<T> * taps_), [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        const int64_t first = v * kWidth<T>;
        const int64_t filled = std::min<int64_t>(kWidth<T>, shape.out_channels - first);
        if (filled == kWidth<T>) {
          pack(shape, weight + first * taps_, v, std::integral_constant<int64_t, kWidth<T>>{});
        } else {
          pack(shape, weight + first * taps_, v, filled);
        }
        std::fill_n(bias_.data() + first, kWidth<T>, T(0));
        if (bias != nullptr) {
          std::copy_n(bias + first, filled, bias_.data() + first);
        }
      }
    });
  }

  int64_t blocks() const {
    return (vectors_ + kVectors - 1) / kVectors;
  }
  int64_t vectors(int64_t block) const {
    return std::min<int64_t>(kVectors, vectors_ - block * kVectors);
  }
  const T* weight(int64_t block) const {
    return weight_.data() + block * kVectors * kWidth<T> * taps_;
  }
  const T* bias(int64_t block) const {
    return bias_.data() + block * kVectors * kWidth<T>;
  }

 private:
  // One vector of output channels, whose weights begin at `from`.
  void pack(const ConvReluPoolShape& shape, const T* from, int64_t vector, auto filled) {
    const int64_t block = vector / kVectors;
    const int64_t lanes = vectors(block) * kWidth<T>;
    T* const to = weight_.data() + block * kVectors * kWidth<T> * taps_ + vector % kVectors * kWidth<T>;
    for (int64_t in = 0; in < shape.in_channels; ++in) {
      for (int64_t k = 0; k < shape.kernel_size(); ++k, ++from) {
        T* const tap = to + (k * shape.in_channels + in) * lanes;
        for (int64_t lane = 0; lane < filled; ++lane) {
          tap[lane] = from[lane * taps_];
        }
        for (int64_t lane = filled; lane < kWidth<T>; ++lane) {
          tap[lane] = T(0);
        }
      }
    }
  }

  const int64_t taps_;
  const int64_t vectors_;
  AlignedBuffer<T> weight_;
  AlignedBuffer<T> bias_;
};

// `vectors` vectors of channels of one block of positions, into the outputs.
template <typename T, int vectors, int quads>
void run_block(
    const ConvReluPoolShape& shape,
    const T* const (&inputs)[kBlock],
    int64_t outputs,
    const T* weight,
    const T* bias,
    int64_t channels,
    T* output,
    uint8_t* index) {
  constexpr int width = kWidth<T>;
  alignas(64) T sums[kBlock * vectors * width];
  for (int64_t p = 0; p < outputs * quads; p += kPositions) {
    const T* tile[kPositions];
    std::copy_n(inputs + p, kPositions, tile);
    convolve<T, vectors>(shape, tile, weight, bias, sums + p * vectors * width);
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; c += width) {
      finish<T, quads>(
          sums + o * quads * vectors * width + c,
          vectors * width,
          output + o * shape.out_channels + c,
          index == nullptr ? nullptr : index + o * shape.out_channels + c,
          std::min<int64_t>(width, channels - c));
    }
  }
}

template <typename T, int quads>
void run(
    const ConvReluPoolShape& shape, const T* input, const PackedWeight<T>& packed, T* output, uint8_t* index) {
  constexpr int most = kBlock / quads;
  const auto offsets = shape.quad_offsets();
  const int64_t total = shape.outputs();
  const int64_t grain = conv_grain(kBlock * shape.taps() * shape.out_channels);
  at::parallel_for(0, (total + most - 1) / most, grain, [&](int64_t begin, int64_t end) {
    OutputCursor cursor(shape, begin * most);
    for (int64_t first = begin * most; first < std::min(end * most, total); first += most) {
      const int64_t outputs = std::min<int64_t>(most, total - first);
      const T* inputs[kBlock];
      for (int64_t o = 0; o < outputs; ++o, cursor.advance()) {
        const T* at = input + cursor.image() * shape.image_size() + cursor.offset();
        for (int q = 0; q < quads; ++q) {
          inputs[o * quads + q] = at + offsets[q];
        }
      }
      // A last tile is filled up with positions whose sums nobody reads.
      std::fill(inputs + outputs * quads, inputs + kBlock, inputs[0]);
      for (int64_t b = 0; b < packed.blocks(); ++b) {
        const int64_t channel = b * kVectors * kWidth<T>;
        const int64_t at = first * shape.out_channels + channel;
        const auto run_vectors = [&](auto vectors) {
          run_block<T, vectors, quads>(
              shape,
              inputs,
              outputs,
              packed.weight(b),
              packed.bias(b),
              std::min<int64_t>(vectors * kWidth<T>, shape.out_channels - channel),
              output + at,
              index == nullptr ? nullptr : index + at);
        };
        c10::ForcedUnroll<kVectors>{}([&](auto v) {
          if (packed.vectors(b) == v + 1) {
            run_vectors(std::integral_constant<int, v + 1>{});
          }
        });
      }
    }
  });
}

}  // namespace

template <typename T>
void conv_relu_pool_forward(
    const ConvReluPoolShape& shape,
    const T* input,
    const T* weight,
    const T* bias,
    T* output,
    uint8_t* index) {
  const PackedWeight<T> packed(shape, weight, bias);
  if (shape.pool) {
    run<T, 4>(shape, input, packed, output, index);
  } else {
    run<T, 1>(shape, input, packed, output, index);
  }
}

template void conv_relu_pool_forward(
    const ConvReluPoolShape&, const float*, const float*, const float*, float*, uint8_t*);
template void conv_relu_pool_forward(
    const ConvReluPoolShape&, const double*, const double*, const double*, double*, uint8_t*);

}  // namespace lightkit::cpu
