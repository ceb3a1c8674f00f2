// Kernels that the emulation itself is tested with.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace lightkit::cuda {

// Runs the kernel of that name on 64 floats.
cudaError_t fault(const std::string& name, float* out);

}  // namespace lightkit::cuda
