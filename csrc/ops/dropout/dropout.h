// The op of dropout, as in cross_entropy.h.
#pragma once

#include "../common/checks.h"
#include "../common/tensors.h"

#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>

#include <vector>

namespace lightkit {

// lightkit::dropout. `seed` has one int64. `order` is a permutation of the dimensions: the generator counts the
// elements of the input in this order, the last dimension fastest. Without it the order is that of the input's memory.
// The output has the elements in this order in memory.
using DropoutOp =
    at::Tensor(const at::Tensor& input, const at::Tensor& seed, double p, c10::OptionalArrayRef<int64_t> order);
DropoutOp dropout_meta, dropout_cpu, dropout_autograd, call_dropout;

// Raises for arguments that do not fit. Returns the order, which is that of the memory of a dense input, and that of
// the dimensions for any other input, if none is given.
std::vector<int64_t> check_dropout(
    const at::Tensor& input, const at::Tensor& seed, double p, c10::OptionalArrayRef<int64_t> order);

// Returns the permutation that undoes another one.
std::vector<int64_t> inverse_order(at::IntArrayRef order);

// Returns true if `order` is 0, 1, 2, ...
bool is_identity(at::IntArrayRef order);

}  // namespace lightkit
