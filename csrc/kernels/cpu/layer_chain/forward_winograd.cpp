// The forward pass by Winograd's algorithm: it transforms tiles, multiplies them point by point as matrices, and
// transforms the products back into the positions of a window.

#include "forward_tile.h"

namespace lightkit::cpu::layer_chain {

template <typename T>
void ForwardKernel<T>::run_winograd(int64_t images, const T* input, T* output, uint8_t* argmax) const {
  constexpr int width = kWidth<T>;
  const int64_t in_channels = shape_.in_channels;
  const int64_t total = images * shape_.positions();
  // The products of a point are a 1x1 convolution over the tiles.
  const Shape product{1, 1, in_channels, shape_.out_channels, 1, 1, false, false};
  // [kPoints, kWinogradTiles, in_channels] and [kPoints, kWinogradTiles, vectors, width].
  AlignedBuffer<T> inputs(winograd::kPoints * kWinogradTiles * in_channels);
  AlignedBuffer<T> products(winograd::kPoints * kWinogradTiles * kVectors * width);
  alignas(64) const T no_bias[kVectors * width] = {};
  alignas(64) T positions[4 * width];
  OutputCursor cursor(shape_);
  for (int64_t first = 0; first < total; first += kWinogradTiles) {
    const int64_t tiles = std::min<int64_t>(kWinogradTiles, total - first);
    // If the last block is not full, the tiles from `tiles` on keep old values; their products are not read.
    for (int64_t t = 0; t < tiles; ++t, cursor.advance()) {
      for (int64_t c = 0; c < in_channels; c += width) {
        const T* const tile = input + cursor.offset() + c;
        winograd::transform_input<T>(
            [&](int row, int column) { return Vec<T>::loadu(tile + row * shape_.row_size() + column * in_channels); },
            inputs.data() + t * in_channels + c,
            kWinogradTiles * in_channels);
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
              x[p] = inputs.data() + (point * kWinogradTiles + t + p) * in_channels;
            }
            convolve<T, count>(
                product,
                x,
                weight + point * in_channels * lanes,
                no_bias,
                products.data() + (point * kWinogradTiles + t) * lanes);
          }
        }
      });
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t c = 0; c < channels; c += width) {
          const int64_t at = (first + t) * shape_.out_channels + channel + c;
          const auto window = winograd::transform_output<T>(
              products.data() + t * lanes + c,
              kWinogradTiles * lanes,
              Vec<T>::loadu(packed_bias_.data() + channel + c));
          LIGHTKIT_UNROLL
          for (int p = 0; p < 4; ++p) {
            window[p].store(positions + p * width);
          }
          finish<T, 4>(
              positions,
              width,
              shape_.relu,
              output + at,
              argmax == nullptr ? nullptr : argmax + at,
              std::min<int64_t>(width, channels - c));
        }
      }
    }
  }
}

template void ForwardKernel<float>::run_winograd(int64_t, const float*, float*, uint8_t*) const;
template void ForwardKernel<double>::run_winograd(int64_t, const double*, double*, uint8_t*) const;

}  // namespace lightkit::cpu::layer_chain
