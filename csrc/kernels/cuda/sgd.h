// SGD on a GPU: see ../sgd.h for the update.
#pragma once

#include "../sgd.h"

#include <cuda_runtime_api.h>

namespace lightkit::cuda {

// Enqueues the update of every tensor, all on the current device, on `stream`; nothing waits for the device.
cudaError_t sgd(const std::vector<SgdTensor>& tensors, cudaStream_t stream);

}  // namespace lightkit::cuda
