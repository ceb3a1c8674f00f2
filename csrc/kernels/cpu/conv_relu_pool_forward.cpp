// The forward pass: a direct convolution in registers, or the products of Winograd's, pooled before anything is
// stored.
//
// A tile is kPositions positions by kVectors vectors of output channels, all of whose sums stay in registers: for
// each input that a position reads, one broadcast and kVectors multiply-adds. A block of tiles then fills a buffer
// in the first-level cache, from which ReLU and pool write the output.

#include "conv_relu_pool.h"
#include "conv_relu_pool_winograd.h"

#include <c10/util/Unroll.h>

#include <type_traits>
#include <utility>

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

// ReLU, if there is one, and the pool over `quads` positions, of one vector of channels; `stride` from position to
// position.
template <typename T, int quads>
void finish(const T* sums, int64_t stride, bool relu, T* output, uint8_t* index, int64_t count) {
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
  const auto dead = relu ? best <= Values{} : Numbers{};
  store_lanes(dead ? Values{} : best, output, count);
  if (index != nullptr) {
    store_lanes(__builtin_convertvector(dead ? Numbers{} + kDead : winner, LaneBytes<T>), index, count);
  }
}

// Writes, tap after tap, what `rows` rows of `taps` have there, filled up with 0 to a vector, to next().
template <typename T>
void pack_taps(const T* from, int64_t rows, int64_t taps, auto&& next) {
  constexpr int width = kWidth<T>;
  int64_t tap = 0;
  if (rows == width) {
    alignas(64) T square[width * width];
    for (; tap + width <= taps; tap += width) {
      at::vec::transpose_mxn<T, width, width>(from + tap, taps, square, width);
      for (int64_t t = 0; t < width; ++t) {
        Vec<T>::loadu(square + t * width).store(next());
      }
    }
  }
  for (; tap < taps; ++tap) {
    T* const to = next();
    for (int64_t lane = 0; lane < width; ++lane) {
      to[lane] = lane < rows ? from[lane * taps + tap] : T(0);
    }
  }
}

// Calls f(n) with n, from 1 to kVectors, known when compiled.
template <typename F>
void with_vectors(int64_t vectors, const F& f) {
  c10::ForcedUnroll<kVectors>{}([&](auto v) {
    if (vectors == v + 1) {
      f(std::integral_constant<int, v + 1>{});
    }
  });
}

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
          shape.relu,
          output + o * shape.out_channels + c,
          index == nullptr ? nullptr : index + o * shape.out_channels + c,
          std::min<int64_t>(width, channels - c));
    }
  }
}

}  // namespace

template <typename T>
ConvReluPoolForward<T>::ConvReluPoolForward(const ConvReluPoolShape& shape, const T* weight, const T* bias)
    : shape_(shape),
      weight_(weight),
      bias_(bias),
      vectors_((shape.out_channels + kWidth<T> - 1) / kWidth<T>),
      winograd_(winograd::applies<T>(shape)),
      packed_(vectors_ * kWidth<T> * (winograd_ ? winograd::kPoints * shape.in_channels : shape.taps())),
      packed_bias_(vectors_ * kWidth<T>) {}

template <typename T>
int64_t ConvReluPoolForward<T>::blocks() const {
  return (vectors_ + kVectors - 1) / kVectors;
}

template <typename T>
int64_t ConvReluPoolForward<T>::vectors(int64_t block) const {
  return std::min<int64_t>(kVectors, vectors_ - block * kVectors);
}

// A unit is a vector of output channels. For each kVectors of them the packed weight has a block as `convolve` reads
// it, the lanes without a channel 0.
template <typename T>
void ConvReluPoolForward<T>::prepare(int64_t begin, int64_t end) {
  const int64_t taps = shape_.taps();
  AlignedBuffer<T> transposed(winograd_ ? taps * kWidth<T> : 0);
  for (int64_t v = begin; v < end; ++v) {
    const int64_t first = v * kWidth<T>;
    const int64_t filled = std::min<int64_t>(kWidth<T>, shape_.out_channels - first);
    const int64_t lanes = vectors(v / kVectors) * kWidth<T>;
    const int64_t size = winograd_ ? winograd::kPoints * shape_.in_channels : taps;
    T* const to = packed_.data() + v / kVectors * kVectors * kWidth<T> * size + v % kVectors * kWidth<T>;
    if (winograd_) {
      // From (lane, in, k) to (in, k, lane), and from there to (point, in, lane).
      T* tap = transposed.data();
      pack_taps<T>(weight_ + first * taps, filled, taps, [&] { return std::exchange(tap, tap + kWidth<T>); });
      for (int64_t in = 0; in < shape_.in_channels; ++in) {
        winograd::transform_weight<T>(
            transposed.data() + in * shape_.kernel_size() * kWidth<T>, to + in * lanes, shape_.in_channels * lanes);
      }
    } else {
      // From (lane, in, k) to (k, in, lane).
      pack_taps<T>(weight_ + first * taps, filled, taps, [&, in = int64_t(0), k = int64_t(0)]() mutable {
        T* const tap = to + (k * shape_.in_channels + in) * lanes;
        if (++k == shape_.kernel_size()) {
          k = 0;
          ++in;
        }
        return tap;
      });
    }
    std::fill_n(packed_bias_.data() + first, kWidth<T>, T(0));
    if (bias_ != nullptr) {
      std::copy_n(bias_ + first, filled, packed_bias_.data() + first);
    }
  }
}

template <typename T>
template <int quads>
void ConvReluPoolForward<T>::run(int64_t images, const T* input, T* output, uint8_t* index) const {
  constexpr int most = kBlock / quads;
  const auto offsets = shape_.quad_offsets();
  const int64_t total = images * shape_.positions();
  OutputCursor cursor(shape_);
  for (int64_t first = 0; first < total; first += most) {
    const int64_t outputs = std::min<int64_t>(most, total - first);
    const T* inputs[kBlock];
    for (int64_t o = 0; o < outputs; ++o, cursor.advance()) {
      const T* at = input + cursor.offset();
      for (int q = 0; q < quads; ++q) {
        inputs[o * quads + q] = at + offsets[q];
      }
    }
    // A last tile is filled up with positions whose sums nobody reads.
    std::fill(inputs + outputs * quads, inputs + kBlock, inputs[0]);
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t channel = b * kVectors * kWidth<T>;
      const int64_t at = first * shape_.out_channels + channel;
      with_vectors(vectors(b), [&](auto count) {
        run_block<T, count, quads>(
            shape_,
            inputs,
            outputs,
            packed_.data() + channel * shape_.taps(),
            packed_bias_.data() + channel,
            std::min<int64_t>(count * kWidth<T>, shape_.out_channels - channel),
            output + at,
            index == nullptr ? nullptr : index + at);
      });
    }
  }
}

// A 3x3 kernel on one channel, as on grey images: registers hold all its weights for so many vectors of output
// channels, and an input is read once for all positions of an output.
constexpr int kGreyVectors = kVectors / 2;

bool is_grey(const ConvReluPoolShape& shape) {
  return shape.pool && shape.in_channels == 1 && shape.kernel_height == 3 && shape.kernel_width == 3;
}

template <typename T, int vectors>
void convolve_grey(
    const ConvReluPoolShape& shape,
    int64_t images,
    const T* input,
    const T* weight,
    int64_t weight_stride,  // from tap to tap
    const T* bias,
    int64_t channels,
    T* output,
    uint8_t* index) {
  constexpr int width = kWidth<T>;
  Vec<T> w[9][vectors];
  LIGHTKIT_UNROLL for (int k = 0; k < 9; ++k) {
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      w[k][v] = Vec<T>::loadu(weight + k * weight_stride + v * width);
    }
  }
  OutputCursor cursor(shape);
  for (int64_t o = 0; o < images * shape.positions(); ++o, cursor.advance()) {
    const T* x = input + cursor.offset();
    Vec<T> sum[4][vectors];
    LIGHTKIT_UNROLL for (int q = 0; q < 4; ++q) {
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        sum[q][v] = Vec<T>::loadu(bias + v * width);
      }
    }
    LIGHTKIT_UNROLL for (int i = 0; i < 16; ++i) {
      const Vec<T> value(x[i / 4 * shape.width + i % 4]);
      LIGHTKIT_UNROLL for (int q = 0; q < 4; ++q) {
        const int row = i / 4 - q / 2;
        const int column = i % 4 - q % 2;
        if (row >= 0 && row < 3 && column >= 0 && column < 3) {
          LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
            sum[q][v] = at::vec::fmadd(value, w[row * 3 + column][v], sum[q][v]);
          }
        }
      }
    }
    alignas(64) T sums[4 * vectors * width];
    LIGHTKIT_UNROLL for (int q = 0; q < 4; ++q) {
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        sum[q][v].store(sums + (q * vectors + v) * width);
      }
    }
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      const int64_t at = o * shape.out_channels + v * width;
      finish<T, 4>(
          sums + v * width,
          vectors * width,
          shape.relu,
          output + at,
          index == nullptr ? nullptr : index + at,
          std::min<int64_t>(width, channels - v * width));
    }
  }
}

template <typename T>
void ConvReluPoolForward<T>::run_grey(int64_t images, const T* input, T* output, uint8_t* index) const {
  for (int64_t v = 0; v < vectors_; v += kGreyVectors) {
    const int64_t block = v / kVectors;
    const int64_t channel = v * kWidth<T>;
    const auto convolve = [&](auto count) {
      convolve_grey<T, count>(
          shape_,
          images,
          input,
          packed_.data() + block * kVectors * kWidth<T> * shape_.taps() + v % kVectors * kWidth<T>,
          vectors(block) * kWidth<T>,
          packed_bias_.data() + channel,
          shape_.out_channels - channel,
          output + channel,
          index == nullptr ? nullptr : index + channel);
    };
    if (vectors_ - v >= kGreyVectors) {
      convolve(std::integral_constant<int, kGreyVectors>{});
    } else {
      convolve(std::integral_constant<int, 1>{});
    }
  }
}

// Tiles of a block, whose transformed inputs and products stay in the second-level cache.
constexpr int kTiles = 12;

template <typename T>
void ConvReluPoolForward<T>::run_winograd(int64_t images, const T* input, T* output, uint8_t* index) const {
  constexpr int width = kWidth<T>;
  const int64_t in_channels = shape_.in_channels;
  const int64_t total = images * shape_.positions();
  // For the points of a tile the products are those of a convolution of 1x1.
  const ConvReluPoolShape product{1, 1, in_channels, shape_.out_channels, 1, 1, false, false};
  AlignedBuffer<T> inputs(winograd::kPoints * kTiles * in_channels);
  AlignedBuffer<T> products(winograd::kPoints * kTiles * kVectors * width);
  alignas(64) const T no_bias[kVectors * width] = {};
  alignas(64) T positions[4 * width];
  OutputCursor cursor(shape_);
  for (int64_t first = 0; first < total; first += kTiles) {
    const int64_t tiles = std::min<int64_t>(kTiles, total - first);
    for (int64_t t = 0; t < tiles; ++t, cursor.advance()) {
      for (int64_t c = 0; c < in_channels; c += width) {
        winograd::transform_input<T>(
            input + cursor.offset() + c,
            shape_.row_size(),
            in_channels,
            inputs.data() + t * in_channels + c,
            kTiles * in_channels);
      }
    }
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t channel = b * kVectors * width;
      const int64_t channels = std::min<int64_t>(kVectors * width, shape_.out_channels - channel);
      const int64_t lanes = vectors(b) * width;
      const T* weight = packed_.data() + winograd::kPoints * channel * in_channels;
      with_vectors(vectors(b), [&](auto count) {
        for (int point = 0; point < winograd::kPoints; ++point) {
          for (int64_t t = 0; t < tiles; t += kPositions) {
            const T* x[kPositions];
            for (int p = 0; p < kPositions; ++p) {
              x[p] = inputs.data() + (point * kTiles + t + p) * in_channels;
            }
            convolve<T, count>(
                product,
                x,
                weight + point * in_channels * lanes,
                no_bias,
                products.data() + (point * kTiles + t) * lanes);
          }
        }
      });
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t c = 0; c < channels; c += width) {
          const int64_t at = (first + t) * shape_.out_channels + channel + c;
          winograd::transform_output<T>(
              products.data() + t * lanes + c,
              kTiles * lanes,
              Vec<T>::loadu(packed_bias_.data() + channel + c),
              positions);
          finish<T, 4>(
              positions,
              width,
              shape_.relu,
              output + at,
              index == nullptr ? nullptr : index + at,
              std::min<int64_t>(width, channels - c));
        }
      }
    }
  }
}

template <typename T>
void ConvReluPoolForward<T>::run(int64_t images, const T* input, T* output, uint8_t* index) const {
  if (winograd_) {
    run_winograd(images, input, output, index);
  } else if (is_grey(shape_)) {
    run_grey(images, input, output, index);
  } else if (shape_.pool) {
    run<4>(images, input, output, index);
  } else {
    run<1>(images, input, output, index);
  }
}

template class ConvReluPoolForward<float>;
template class ConvReluPoolForward<double>;

}  // namespace lightkit::cpu
