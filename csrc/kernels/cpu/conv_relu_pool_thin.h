// The other way to the gradient of the weight.
#pragma once

#include "conv_relu_pool.h"

namespace lightkit::cpu {

// Whether it is the faster one.
template <typename T>
bool is_thin(const ConvReluPoolShape& shape);

template <typename T>
std::unique_ptr<ConvReluPoolGradWeight<T>> make_thin_grad_weight(const ConvReluPoolWeightProblem<T>& problem);

}  // namespace lightkit::cpu
