// Memory of large gradients, kept from one step to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace lightkit {

// An uninitialised contiguous CPU tensor, its memory aligned to 64 bytes.
//
// The first touch of fresh memory costs several times what the kernel does with it: the system clears every
// page. So the memory of a large tensor made here goes, when its last owner lets it go, to the next one of
// about that size. At most two buffers and 1 GiB are kept; small tensors go the usual way.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

inline at::Tensor pooled_empty_like(const at::Tensor& like) {
  return pooled_empty(like.sizes(), like.options());
}

}  // namespace lightkit
