// The two ways to the gradient of the weight.
#pragma once

#include "conv_relu_pool.h"

namespace lightkit::cpu {

// Whether thin_grad_weight is the faster one.
template <typename T>
bool is_thin(const ConvReluPoolShape& shape);

// As conv_relu_pool_grad_weight.
template <typename T>
void thin_grad_weight(
    const ConvReluPoolShape& shape,
    const T* grad_output,
    const uint8_t* index,
    const T* input,
    T* grad_weight,
    T* grad_bias);

}  // namespace lightkit::cpu
