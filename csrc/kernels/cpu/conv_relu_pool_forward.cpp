// The forward pass: the weights in the order of the way that is the fastest, and the way that always goes, a direct
// convolution in registers. A block of tiles fills a buffer in the first-level cache, from which ReLU and pool write
// the output: nothing is stored before it is pooled.

#include "conv_relu_pool_tile.h"
#include "conv_relu_pool_winograd.h"

#include <utility>

namespace lightkit::cpu {
namespace {

// Positions of a block: the weights of kVectors vectors are read from the first-level cache for all of them.
constexpr int kBlock = 24;
static_assert(kBlock % kPositions == 0 && kBlock % 4 == 0);

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

bool is_grey(const ConvReluPoolShape& shape) {
  return shape.pool && shape.in_channels == 1 && shape.kernel_height == 3 && shape.kernel_width == 3;
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
