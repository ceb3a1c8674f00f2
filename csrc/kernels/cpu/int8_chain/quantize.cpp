#include "quantize.h"

#include "vectors.h"

#include <algorithm>

namespace lightkit::cpu::int8_chain {
namespace {

void quantize_run(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    store(quantized(multiply(load_floats(from + i, n), inverse_scale), zero_point, 0), to + i, n);
  }
}

}  // namespace

void quantize(const Shape& s, const Images& images, int64_t image, uint8_t* padded) {
  const auto& strides = images.strides;
  const float* from = images.data + image * strides[0];
  const int64_t channels = s.in_channels;
  const int64_t row_values = s.width * channels;
  const int64_t row_bytes = (s.width + 2 * s.padding[1]) * channels;
  uint8_t* to = padded + s.padding[0] * row_bytes + s.padding[1] * channels;
  const auto run = [&](const float* values, int64_t count, uint8_t* bytes) {
    quantize_run(values, count, images.inverse_scale, s.zero_point, bytes);
  };
  const bool dense_rows = (channels == 1 || strides[1] == 1) && (s.width == 1 || strides[3] == channels);
  const bool dense = dense_rows && row_bytes == row_values && (s.height == 1 || strides[2] == row_values);
  if (dense) {
    run(from, s.height * row_values, to);
    return;
  }
  for (int64_t row = 0; row < s.height; ++row) {
    const float* values = from + row * strides[2];
    uint8_t* bytes = to + row * row_bytes;
    if (dense_rows) {
      run(values, row_values, bytes);
      continue;
    }
    // Gathers each channel of a row, piece by piece.
    constexpr int64_t piece = 256;
    float gathered[piece];
    uint8_t quantized_piece[piece];
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t begin = 0; begin < s.width; begin += piece) {
        const int64_t count = std::min(piece, s.width - begin);
        const float* source = values + channel * strides[1] + begin * strides[3];
        if (strides[3] != 1) {
          for (int64_t i = 0; i < count; ++i) {
            gathered[i] = source[i * strides[3]];
          }
          source = gathered;
        }
        run(source, count, quantized_piece);
        for (int64_t i = 0; i < count; ++i) {
          bytes[(begin + i) * channels + channel] = quantized_piece[i];
        }
      }
    }
  }
}

}  // namespace lightkit::cpu::int8_chain
