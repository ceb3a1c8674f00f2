// The gradient of the weight where a position reads few inputs in a row: see `has_few_channels` in tuning.h.
#pragma once

#include "kernels.h"

namespace lightkit::cpu::layer_chain {

template <typename T>
std::unique_ptr<GradWeightKernel<T>> make_few_channels_grad_weight(const GradWeightProblem<T>& problem);

}  // namespace lightkit::cpu::layer_chain
