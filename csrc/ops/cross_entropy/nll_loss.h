// The negative log-likelihood of a log-softmax, as one cross-entropy.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace lightkit {

// Returns the loss of torch.nn.functional.nll_loss for the result of torch.log_softmax over the classes.
//
// A log-softmax of a log-softmax is itself, so that the cross-entropy of `log_probabilities` is the loss, and its
// gradient is the one with respect to the logits: backward passes the log-softmax by. If a program observes the
// gradient of the log-probabilities, by a hook or by torch.autograd.grad, backward goes through them as in torch.
//
// Args:
//   log_probabilities: [classes], [rows, classes] or [rows, classes, ...], the result of torch's function, not changed
//     since, with a place in autograd's graph.
//   target: int64, the shape of `log_probabilities` without the classes.
//   weight: [classes], or none.
//   reduction: as at::Reduction.
at::Tensor nll_loss_of_log_softmax(
    const at::Tensor& log_probabilities,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    int64_t reduction,
    int64_t ignore_index);

}  // namespace lightkit
