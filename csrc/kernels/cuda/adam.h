// Adam on a GPU: see ../adam.h for the update.
#pragma once

#include "../adam.h"

#include <cuda_runtime_api.h>

namespace lightkit::cuda {

// Enqueues the update of every tensor, all on the current device, on `stream`; nothing waits for the device.
cudaError_t adam(const std::vector<AdamTensor>& tensors, cudaStream_t stream);

}  // namespace lightkit::cuda
