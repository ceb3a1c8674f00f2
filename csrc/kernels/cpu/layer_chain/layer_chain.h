// Consecutive layers on a CPU, forward and backward. A thread takes its images through all layers, so that the output
// of a layer is still in the thread's cache when the next layer reads it.
#pragma once

#include "shape.h"

#include <array>
#include <vector>

namespace lightkit::cpu::layer_chain {

template <typename T>
struct Layer {
  Shape shape;                     // of the padded input
  std::array<int64_t, 2> padding;  // zeros on each side of rows and of columns
  const T* weight;                 // [out_channels, in_channels, kernel_height, kernel_width]
  const T* bias;                   // [out_channels], or null
  float output_scale;              // as in quantize.h, behind ReLU and pool; or 0

  // The size of an unpadded image of the input.
  int64_t unpadded_size() const {
    return (shape.height - 2 * padding[0]) * (shape.width - 2 * padding[1]) * shape.in_channels;
  }
  bool is_padded() const {
    return padding[0] != 0 || padding[1] != 0;
  }
};

// Computes `output`. `activations` and `argmax` are kept for backward, layer after layer, with all images of each.
template <typename T>
void forward(
    const std::vector<Layer<T>>& layers,
    int64_t images,
    const T* input,    // [images, height, width, in_channels] of the first layer, padded
    T* output,         // [images, rows, columns, out_channels] of the last layer
    T* activations,    // the padded inputs of all layers but the first, [images, ...] each; or null
    uint8_t* argmax);  // of the outputs of all layers, [images, ...] each; or null

// The gradients of a layer: both null if they are not wanted, else neither.
template <typename T>
struct LayerGradients {
  T* weight;  // [out_channels, in_channels, kernel_height, kernel_width]
  T* bias;    // [out_channels]
};

// Computes the gradients that are not null.
template <typename T>
void backward(
    const std::vector<Layer<T>>& layers,
    int64_t images,
    const T* grad_output,   // [images, rows, columns, out_channels] of the last layer
    const T* input,         // as in `forward`
    const T* activations,   // from `forward`
    const uint8_t* argmax,  // from `forward`
    T* grad_input,          // [images, height, width, in_channels] of the first layer, unpadded; or null
    const std::vector<LayerGradients<T>>& gradients);

}  // namespace lightkit::cpu::layer_chain
