// The memory plan of the fused linear cross-entropy: which classes keep their exponentials, and which are computed
// twice.
#pragma once

#include "../../common/ceil_div.h"
#include "linear_cross_entropy.h"
#include "logit_tile.h"
#include "tuning.h"

#include <algorithm>
#include <cstdint>

namespace lightkit::cpu::linear_cross_entropy {

struct MemoryPlan {
  int64_t chunk;   // rows of a chunk
  int64_t stride;  // elements from class to class in memory: the rows of a chunk, rounded up to kRowMultiple
  int64_t kept;    // the first classes, whose exponentials stay in memory
  int64_t slice;   // the most other classes whose gradients are in memory at a time
  int64_t kept_bytes;
  int64_t slice_bytes;
  int64_t sum_bytes;  // of the sums of a half-precision hidden gradient

  int64_t bytes() const {
    return kept_bytes + slice_bytes + sum_bytes;
  }
};

// Bytes of a row besides its logits: the sums of each block of classes, and the parts of its gradient.
template <typename acc_t>
int64_t row_bytes(int64_t classes) {
  const int64_t values = ceil_div(classes, kSumClasses) * RowSums<acc_t>::kFields + RowGradients<acc_t>::kFields + 1;
  return values * static_cast<int64_t>(sizeof(acc_t));
}

// Plans a call of at least one row, whose products have operands of type operand_t.
template <typename scalar_t, typename operand_t>
MemoryPlan plan_memory(const Problem<scalar_t>& args) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int64_t size = sizeof(operand_t), acc_size = sizeof(acc_t);
  MemoryPlan plan{args.rows, round_up(args.rows, kRowMultiple), 0, 0, 0, 0, 0};
  if (args.gradient_scale == nullptr) {
    return plan;
  }
  const bool with_loss = args.losses != nullptr;
  const int64_t limit = args.memory_limit - std::min(args.memory_limit / kScratchShare, kScratchBytes);
  if (!is_half<scalar_t> && with_loss) {
    // Each tile has a shift.
    const int64_t kept = args.classes * size + ceil_div(args.classes, kTileClasses) * acc_size;
    int64_t rows = limit / (kept + row_bytes<acc_t>(args.classes));
    rows -= rows % (rows >= kTileRows ? kTileRows : kRowMultiple);
    rows = std::min(rows, plan.stride);
    if (rows >= std::min(plan.stride, kMinChunk)) {
      return {std::min(rows, args.rows), rows, args.classes, 0, args.classes * rows * size, 0, 0};
    }
  }
  if (is_half<scalar_t> && args.hidden_gradient != nullptr) {
    plan.sum_bytes = args.rows * args.features * acc_size;
  }
  const int64_t class_bytes = plan.stride * size, shift_bytes = plan.stride * acc_size / kTileClasses;
  const int64_t rest = std::max<int64_t>(0, limit - plan.sum_bytes - plan.stride * row_bytes<acc_t>(args.classes));
  const int64_t fitting = rest / (class_bytes + shift_bytes);
  if (with_loss && fitting >= args.classes) {
    plan.kept = args.classes;
  } else {
    const int64_t slice = std::max(with_loss ? fitting / kSliceShare : fitting, kMinSlice);
    plan.slice = std::min(slice / kTileClasses * kTileClasses, args.classes);
    plan.kept = with_loss ? std::max<int64_t>(0, fitting - plan.slice) / kTileClasses * kTileClasses : 0;
  }
  plan.kept_bytes = plan.kept * class_bytes;
  plan.slice_bytes = plan.slice * class_bytes;
  return plan;
}

}  // namespace lightkit::cpu::linear_cross_entropy
