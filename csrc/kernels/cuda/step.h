// What the steps of all optimizers have in common on a GPU.
#pragma once

#include "../step.h"

#include <cuda_runtime_api.h>

namespace lightkit::cuda {

// The sums that square_sums writes.
int64_t count_of_square_sums(const std::vector<Gradient>& gradients);

// Enqueues sums of the squares of all values, all on the current device, in double: one of each run of a tensor.
cudaError_t square_sums(const std::vector<Gradient>& gradients, double* sums, cudaStream_t stream);

// Enqueues the norm that comes of them: the root of their sum, added in their order, times `factor`, divided by what
// lies at `scale`, if that is not null.
cudaError_t norm_of_square_sums(
    const double* sums, int64_t count, double factor, const float* scale, double* norm, cudaStream_t stream);

// Enqueues the counting of one step more, unless what lies at `skip` is not 0.
cudaError_t advance_counts(const std::vector<float*>& counts, const float* skip, cudaStream_t stream);

}  // namespace lightkit::cuda
