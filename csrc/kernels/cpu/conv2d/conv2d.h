// Two-dimensional convolution on a CPU: the forward pass and the gradients of input, weight and bias.
//
// Tensors have their channels last. No result depends on the number of threads.
#pragma once

#include "shape.h"

namespace lightkit::cpu::conv2d {

// output = conv(input, weight) + bias.
//
// `mean` and `variance` are those of each channel of the output, over images, rows and columns; the variance is the
// biased one.
template <typename T>
void forward(
    const Shape& shape,
    const Images<const T>& input,
    const T* weight,  // [out_channels, in_channels / groups, kernel rows, kernel columns]
    const T* bias,    // [out_channels], or null
    T* output,        // [images, rows, columns, out_channels], dense
    T* mean,          // [out_channels], or null
    T* variance);     // as `mean`

template <typename T>
void grad_input(
    const Shape& shape,
    const T* grad_output,  // [images, rows, columns, out_channels], dense
    const T* weight,       // as in `forward`
    T* grad_input);        // [images, rows, columns, in_channels], dense

template <typename T>
void grad_weight(
    const Shape& shape,
    const Images<const T>& input,
    const T* grad_output,  // as in `grad_input`
    T* grad_weight,        // as the weight; or null
    T* grad_bias);         // [out_channels], or null

}  // namespace lightkit::cpu::conv2d
