// The forward pass: it chooses an algorithm and packs the weights for it. The direct convolution, which takes every
// shape, is here: tiles of it fill a buffer in the first-level cache, from which ReLU and pool write the output, so
// that nothing is stored before it is pooled.

#include "forward_tile.h"
#include "pack_taps.h"

#include <utility>

namespace lightkit::cpu::layer_chain {
namespace {

bool is_single_channel(const Shape& shape) {
  return shape.pool && shape.in_channels == 1 && shape.kernel_height == 3 && shape.kernel_width == 3;
}

// Computes `outputs` outputs of `channels` channels, at most `vectors` vectors.
template <typename T, int vectors, int window>
void run_block(
    const Shape& shape,
    const T* const (&inputs)[kBlockPositions],  // each [kernel_height, run], rows `row_size` apart
    int64_t outputs,
    const T* weight,  // [kernel_height, run, vectors, width]
    const T* bias,    // [vectors, width]
    int64_t channels,
    T* output,          // [outputs, channels], outputs `out_channels` apart
    uint8_t* argmax) {  // as `output`, or null
  constexpr int width = kWidth<T>;
  alignas(64) T sums[kBlockPositions * vectors * width];
  for (int64_t p = 0; p < outputs * window; p += kPositions) {
    const T* tile[kPositions];
    std::copy_n(inputs + p, kPositions, tile);
    convolve<T, vectors>(shape, tile, weight, bias, sums + p * vectors * width);
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; c += width) {
      finish<T, window>(
          sums + o * window * vectors * width + c,
          vectors * width,
          shape.relu,
          output + o * shape.out_channels + c,
          argmax == nullptr ? nullptr : argmax + o * shape.out_channels + c,
          std::min<int64_t>(width, channels - c));
    }
  }
}

}  // namespace

template <typename T>
ForwardKernel<T>::ForwardKernel(const Shape& shape, const T* weight, const T* bias)
    : shape_(shape),
      weight_(weight),
      bias_(bias),
      vectors_(ceil_div(shape.out_channels, kWidth<T>)),
      winograd_(winograd_applies<T>(shape)),
      packed_(vectors_ * kWidth<T> * (winograd_ ? winograd::kPoints * shape.in_channels : shape.taps())),
      packed_bias_(vectors_ * kWidth<T>) {}

// The packed weight holds blocks of kVectors vectors of output channels, [blocks, kernel_height, run, vectors, width]
// for `convolve` and [blocks, kPoints, in_channels, vectors, width] for Winograd's algorithm. Lanes without a channel
// are 0.
template <typename T>
void ForwardKernel<T>::prepare(int64_t begin, int64_t end) {
  const int64_t taps = shape_.taps();
  AlignedBuffer<T> transposed(winograd_ ? taps * kWidth<T> : 0);
  for (int64_t v = begin; v < end; ++v) {
    const int64_t first = v * kWidth<T>;
    const int64_t filled = std::min<int64_t>(kWidth<T>, shape_.out_channels - first);
    const int64_t lanes = vectors(v / kVectors) * kWidth<T>;
    const int64_t size = winograd_ ? winograd::kPoints * shape_.in_channels : taps;
    T* const to = packed_.data() + v / kVectors * kVectors * kWidth<T> * size + v % kVectors * kWidth<T>;
    if (winograd_) {
      // [lane, in, k] -> [in, k, lane] -> [point, in, lane].
      T* tap = transposed.data();
      pack_taps<T>(weight_ + first * taps, taps, filled, taps, [&] { return std::exchange(tap, tap + kWidth<T>); });
      for (int64_t in = 0; in < shape_.in_channels; ++in) {
        winograd::transform_weight<T>(
            transposed.data() + in * shape_.kernel_size() * kWidth<T>, to + in * lanes, shape_.in_channels * lanes);
      }
    } else {
      // [lane, in, k] -> [k, in, lane].
      pack_taps<T>(weight_ + first * taps, taps, filled, taps, [&, in = int64_t(0), k = int64_t(0)]() mutable {
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
    if (!winograd_ && windows_are_paired<T>(shape_)) {
      constexpr int half = kWidth<T> / 2;
      for (int64_t tap = 0; tap < taps; ++tap) {
        std::copy_n(to + tap * kWidth<T>, half, to + tap * kWidth<T> + half);
      }
      std::copy_n(packed_bias_.data(), half, packed_bias_.data() + half);
    }
  }
}

template <typename T>
template <int window>
void ForwardKernel<T>::run_direct(int64_t images, const T* input, T* output, uint8_t* argmax) const {
  constexpr int max_outputs = kBlockPositions / window;
  const auto offsets = shape_.window_offsets();
  const int64_t total = images * shape_.positions();
  OutputCursor cursor(shape_);
  for (int64_t first = 0; first < total; first += max_outputs) {
    const int64_t outputs = std::min<int64_t>(max_outputs, total - first);
    const T* inputs[kBlockPositions];
    for (int64_t o = 0; o < outputs; ++o, cursor.advance()) {
      const T* at = input + cursor.offset();
      for (int q = 0; q < window; ++q) {
        inputs[o * window + q] = at + offsets[q];
      }
    }
    // The positions that fill the last tile repeat the first one; their sums are not read.
    std::fill(inputs + outputs * window, inputs + kBlockPositions, inputs[0]);
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t channel = b * kVectors * kWidth<T>;
      const int64_t at = first * shape_.out_channels + channel;
      with_vectors(vectors(b), [&](auto count) {
        run_block<T, count, window>(
            shape_,
            inputs,
            outputs,
            packed_.data() + channel * shape_.taps(),
            packed_bias_.data() + channel,
            std::min<int64_t>(count * kWidth<T>, shape_.out_channels - channel),
            output + at,
            argmax == nullptr ? nullptr : argmax + at);
      });
    }
  }
}

template <typename T>
void ForwardKernel<T>::run(int64_t images, const T* input, T* output, uint8_t* argmax) const {
  if (winograd_) {
    run_winograd(images, input, output, argmax);
  } else if (is_single_channel(shape_)) {
    run_single_channel(images, input, output, argmax);
  } else if (windows_are_paired<T>(shape_)) {
    run_half_vector(images, input, output, argmax);
  } else if (shape_.pool && vectors_ == 1) {
    run_one_vector(images, input, output, argmax);
  } else if (shape_.pool) {
    run_direct<4>(images, input, output, argmax);
  } else {
    run_direct<1>(images, input, output, argmax);
  }
}

template class ForwardKernel<float>;
template class ForwardKernel<double>;

}  // namespace lightkit::cpu::layer_chain
