// SGD on a GPU. ../../optim/sgd.h has the update.
#pragma once

#include "../../optim/sgd.h"

#include <cuda_runtime_api.h>

namespace lightkit::cuda::optim {

// Enqueues the update of every parameter, all on the current device, on `stream`. It does not wait for the device.
cudaError_t sgd(const std::vector<SgdTensor>& tensors, cudaStream_t stream);

}  // namespace lightkit::cuda::optim
