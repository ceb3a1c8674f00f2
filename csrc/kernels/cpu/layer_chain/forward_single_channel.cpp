// The forward pass of a pooled 3x3 kernel on a single input channel, as on grey images. Registers hold all 9 weights of
// some vectors of output channels, and each input is read once for all positions of a window.

#include "forward_tile.h"

namespace lightkit::cpu::layer_chain {
namespace {

template <typename T, int vectors>
void convolve_single_channel(
    const Shape& shape,
    int64_t images,
    const T* input,   // [images, height, width]
    const T* weight,  // [9, vectors, width], taps `weight_stride` apart
    int64_t weight_stride,
    const T* bias,  // [vectors, width]
    int64_t channels,
    T* output,          // [images, rows, columns, channels], outputs `out_channels` apart
    uint8_t* argmax) {  // as `output`, or null
  constexpr int width = kWidth<T>;
  Vec<T> w[9][vectors];
  LIGHTKIT_UNROLL
  for (int k = 0; k < 9; ++k) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      w[k][v] = Vec<T>::loadu(weight + k * weight_stride + v * width);
    }
  }
  OutputCursor cursor(shape);
  for (int64_t o = 0; o < images * shape.positions(); ++o, cursor.advance()) {
    const T* x = input + cursor.offset();
    Vec<T> sum[4][vectors];
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sum[q][v] = Vec<T>::loadu(bias + v * width);
      }
    }
    LIGHTKIT_UNROLL
    for (int i = 0; i < 16; ++i) {
      const Vec<T> value(x[i / 4 * shape.width + i % 4]);
      LIGHTKIT_UNROLL
      for (int q = 0; q < 4; ++q) {
        const int row = i / 4 - q / 2;
        const int column = i % 4 - q % 2;
        if (row >= 0 && row < 3 && column >= 0 && column < 3) {
          LIGHTKIT_UNROLL
          for (int v = 0; v < vectors; ++v) {
            sum[q][v] = at::vec::fmadd(value, w[row * 3 + column][v], sum[q][v]);
          }
        }
      }
    }
    alignas(64) T sums[4 * vectors * width];
    LIGHTKIT_UNROLL
    for (int q = 0; q < 4; ++q) {
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sum[q][v].store(sums + (q * vectors + v) * width);
      }
    }
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = o * shape.out_channels + v * width;
      finish<T, 4>(
          sums + v * width,
          vectors * width,
          shape.relu,
          output + at,
          argmax == nullptr ? nullptr : argmax + at,
          std::min<int64_t>(width, channels - v * width));
    }
  }
}

}  // namespace

template <typename T>
void ForwardKernel<T>::run_single_channel(int64_t images, const T* input, T* output, uint8_t* argmax) const {
  for (int64_t v = 0; v < vectors_; v += kSingleChannelVectors) {
    const int64_t block = v / kVectors;
    const int64_t channel = v * kWidth<T>;
    const auto convolve = [&](auto count) {
      convolve_single_channel<T, count>(
          shape_,
          images,
          input,
          packed_.data() + block * kVectors * kWidth<T> * shape_.taps() + v % kVectors * kWidth<T>,
          vectors(block) * kWidth<T>,
          packed_bias_.data() + channel,
          shape_.out_channels - channel,
          output + channel,
          argmax == nullptr ? nullptr : argmax + channel);
    };
    if (vectors_ - v >= kSingleChannelVectors) {
      convolve(std::integral_constant<int, kSingleChannelVectors>{});
    } else {
      convolve(std::integral_constant<int, 1>{});
    }
  }
}

template void ForwardKernel<float>::run_single_channel(int64_t, const float*, float*, uint8_t*) const;
template void ForwardKernel<double>::run_single_channel(int64_t, const double*, double*, uint8_t*) const;

}  // namespace lightkit::cpu::layer_chain
