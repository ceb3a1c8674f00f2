// One layer of the chain, on a group of images whose activations lie in memory.
#pragma once

#include "int8_chain.h"

#include <cstdint>
#include <vector>

namespace lightkit::cpu::int8_chain {

// Where the outputs of a layer go: the interior of the next layer's padded input, or the output of the chain.
struct Destination {
  uint8_t* data;                             // the first output of the first image, of any type
  int64_t image_step, row_step, pixel_step;  // bytes
  int64_t channel_bytes;                     // 1, or 4 of the last layer
  int32_t zero_point;                        // of the outputs, except of the last layer
  bool last;
};

// Returns where the quads of a position's inputs begin, in bytes from its first input.
std::vector<int32_t> offsets_of_quads(const Shape& shape);

// Computes a layer on `images` images. `input` is [images][height + 2 padding][width + 2 padding][in_channels], whose
// images are `image_step` bytes apart and have kReadBehind readable bytes behind them. `offsets` are those of
// offsets_of_quads.
void compute_layer(
    const Layer& layer,
    const int32_t* offsets,
    int64_t images,
    const uint8_t* input,
    int64_t image_step,
    const Destination& destination);

}  // namespace lightkit::cpu::int8_chain
