// Adam on a GPU. ../../optim/adam.h has the update.
#pragma once

#include "../../optim/adam.h"

#include <cuda_runtime_api.h>

namespace lightkit::cuda::optim {

// Enqueues the update of every parameter, all on the current device, on `stream`. It does not wait for the device.
cudaError_t adam(const std::vector<AdamTensor>& tensors, cudaStream_t stream);

}  // namespace lightkit::cuda::optim
