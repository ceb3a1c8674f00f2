// The images of a chain as bytes.
#pragma once

#include "int8_chain.h"

namespace lightkit::cpu::int8_chain {

// Quantizes an image into the interior of the first layer's padded input, [height + 2 padding][width + 2 padding]
// [channels], whose first byte is at `padded`.
void quantize(const Shape& first, const Images& images, int64_t image, uint8_t* padded);

}  // namespace lightkit::cpu::int8_chain
