// Layers one after the other on a CPU, forward and backward: a thread takes its images through all of them, while what
// comes out of one is still in its cache.
#pragma once

#include "conv_relu_pool.h"

#include <vector>

namespace lightkit::cpu {

template <typename T>
struct ChainLayer {
  ConvReluPoolShape shape;  // of the padded input
  std::array<int64_t, 2> padding;
  const T* weight;
  const T* bias;  // or null

  // An image of its input without the padding.
  int64_t unpadded_size() const {
    return (shape.height - 2 * padding[0]) * (shape.width - 2 * padding[1]) * shape.in_channels;
  }
  bool is_padded() const {
    return padding[0] != 0 || padding[1] != 0;
  }
};

// `input` is that of the first layer, padded. For backward it keeps, unless they are null, the padded inputs of the
// other layers in `activations`, and in `index` which positions won, of all layers: layer after layer, with all images
// of each.
template <typename T>
void layer_chain_forward(
    const std::vector<ChainLayer<T>>& layers,
    int64_t images,
    const T* input,
    T* output,
    T* activations,
    uint8_t* index);

// Where the gradients of a layer go: both null if they are not wanted, else neither.
template <typename T>
struct ChainGradients {
  T* weight;
  T* bias;
};

// `grad_input`, of the unpadded input, may be null.
template <typename T>
void layer_chain_backward(
    const std::vector<ChainLayer<T>>& layers,
    int64_t images,
    const T* grad_output,
    const T* input,
    const T* activations,
    const uint8_t* index,
    T* grad_input,
    const std::vector<ChainGradients<T>>& gradients);

}  // namespace lightkit::cpu
