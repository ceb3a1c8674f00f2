// The op on weights that are rounded to a few levels, as in cross_entropy.h.
#pragma once

#include "../common/checks.h"
#include "../common/tensors.h"

namespace lightkit {

// lightkit::_fake_quantize_weights_. Writes to `outputs`, and returns the scales of the rows of all tensors, [rows]. No
// gradient goes through the op.
using FakeQuantizeOp = at::Tensor(at::TensorList weights, at::TensorList outputs, int64_t bits);
FakeQuantizeOp fake_quantize_weights_meta, fake_quantize_weights_cpu;

}  // namespace lightkit
