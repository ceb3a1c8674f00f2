// The element types that the kernels take, for headers without torch's or CUDA's types.
#pragma once

#include <cstdint>

namespace lightkit {

enum class ElementType : uint8_t { Float, Double, BFloat16, Half };

}  // namespace lightkit
