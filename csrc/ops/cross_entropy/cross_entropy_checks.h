// Shapes and checks of cross-entropy, also for symbolic sizes.
#pragma once

#include "cross_entropy.h"

#include <vector>

namespace lightkit {

// Returns the dimension of the classes.
inline int64_t class_dim(const at::Tensor& logits) {
  return logits.dim() == 1 ? 0 : 1;
}

// Returns the sizes (int64_t or SymInt) of the logits without the classes.
template <typename Sizes>
auto without_classes(const at::Tensor& logits, const Sizes& sizes) {
  auto result = sizes.vec();
  result.erase(result.begin() + class_dim(logits));
  return result;
}

// Raises torch's errors for arguments that do not fit; the messages name the argument.
void check_arguments(
    const at::Tensor& logits,
    const at::Tensor& target,
    const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options);

}  // namespace lightkit
