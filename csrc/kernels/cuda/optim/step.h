// The norm of gradients, and counters of steps, on a GPU.
#pragma once

#include "../../optim/step.h"

#include <cuda_runtime_api.h>

namespace lightkit::cuda::optim {

// Returns the number of sums that square_sums writes.
int64_t count_of_square_sums(const std::vector<Gradient>& gradients);

// Enqueues the sums of squares of the gradients, all on the current device, in double: one for each run of a gradient.
cudaError_t square_sums(
    const std::vector<Gradient>& gradients,
    double* sums,  // [count_of_square_sums(gradients)]
    cudaStream_t stream);

// Enqueues norm = sqrt(sum of `sums`) * factor / scale. The sums are added in their order.
cudaError_t norm_of_square_sums(
    const double* sums,  // [count]
    int64_t count,
    double factor,
    const float* scale,  // [1], or null for 1
    double* norm,        // [1]
    cudaStream_t stream);

// Enqueues the addition of 1 to every counter [1], unless skip[0] is not 0.
cudaError_t advance_counts(
    const std::vector<float*>& counts,
    const float* skip,  // [1], or null for 0
    cudaStream_t stream);

}  // namespace lightkit::cuda::optim
