// A chain of convolutions and linear layers on 8-bit integers, with exact sums.
//
// A layer computes, with the inputs q and the weights w of an output channel c,
//
//   sum = bias[c] + sum of (q - zero_point) w       int32, modulo 2^32
//   sum = relu(max-pool(sum))                       if the layer has them
//   y   = float(sum) multiplier[c]                  rounded to float twice
//
// The last layer returns y. Any other layer returns clamp(rint(y) + zero point of the next layer, 0, 255), rounded to
// the nearest even integer. The pool of sums is that of the results, because the multiplier is positive. The results
// have the same bits on every processor: integers are exact, and no product is fused with a sum. The scheme is that of
// Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
// 2018.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace lightkit::cpu::int8_chain {

// The sizes of a layer. A linear layer is a 1x1 convolution of an image of one pixel.
struct Shape {
  int64_t in_channels, height, width;   // of an image, without padding
  int64_t out_channels, rows, columns;  // of the convolution's output, before the pool
  int64_t kernel_height, kernel_width;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
  bool relu;
  bool pool;           // 2x2, stride 2; an odd last row or column is dropped
  int32_t zero_point;  // of the inputs; also the value of the padding
};

struct Layer {
  Shape shape;
  const uint8_t* packed;  // [packed_bytes(shape)], as `pack` writes it; aligned to 4 bytes
};

// The parameters of a layer.
struct Parameters {
  const int8_t* weight;     // [out_channels, in_channels / groups, kernel_height, kernel_width]
  const int32_t* bias;      // [out_channels]
  const float* multiplier;  // [out_channels]
  int64_t channels_before;  // of a linear layer: in_channels are [channels_before, pixels] in the weight, and [pixels,
                            // channels_before] in the input; otherwise in_channels
};

// The images: float, quantized to clamp(rint(x inverse_scale) + zero point of the first layer, 0, 255). NaN becomes 0.
struct Images {
  const float* data;               // [count, channels, height, width]
  std::array<int64_t, 4> strides;  // in elements
  int64_t count;
  float inverse_scale;
};

// Returns the bytes of a layer's packed parameters, a multiple of 64. Sizes of the image do not matter.
int64_t packed_bytes(const Shape& shape);

// Writes a layer's parameters as the kernels read them: the same bytes on every processor.
void pack(const Shape& shape, const Parameters& parameters, uint8_t* packed);

// Returns uninitialised memory of so many bytes, aligned to 64, that lives until the call of `forward` returns.
using Allocate = std::function<uint8_t*(int64_t bytes)>;

// Computes the chain: the output is [count, rows, columns, out_channels] of the last layer, behind its pool. Threads
// share the images. Calls `allocate` once, for the activations of the images that are computed at a time.
void forward(const std::vector<Layer>& layers, const Images& images, float* output, const Allocate& allocate);

}  // namespace lightkit::cpu::int8_chain
