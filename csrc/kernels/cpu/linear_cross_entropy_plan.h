// How the fused linear cross-entropy shares out its memory: which logits stay, and which are computed twice.
#pragma once

#include "linear_cross_entropy.h"
#include "linear_cross_entropy_tile.h"

#include <algorithm>
#include <cstdint>

namespace lightkit::cpu {

// Classes whose sums of exponentials are one term of a row's: a sum does not depend on who computes which term.
constexpr int64_t kSumClasses = 1024;

// Rows whose logits fill a chunk, at least: with fewer the weights are read too often.
constexpr int64_t kLeastChunk = 64;

// Of the memory, the share of a slice where not everything can be kept: a slice is a trip through all hidden states.
constexpr int64_t kSliceShare = 8;

// What is left of the limit for the scratch of some threads: by their number the plan, and with it the order of sums,
// must not change.
constexpr int64_t kForScratch = int64_t(4) << 20;

// Classes of a slice, at least.
constexpr int64_t kLeastSlice = 256;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t multiple) {
  return ceil_div(a, multiple) * multiple;
}

// How memory and work are shared out.
struct Plan {
  int64_t chunk;     // rows that are worked on together
  int64_t stride;    // of a class in memory: the rows of a chunk, rounded up
  int64_t kept;      // classes, the first ones, whose exponentials stay in memory
  int64_t slice;     // of the others, at most how many have their gradients in memory at a time
  int64_t kept_bytes;
  int64_t slice_bytes;
  int64_t sum_bytes;  // for the sum of the hidden gradient in float

  int64_t bytes() const {
    return kept_bytes + slice_bytes + sum_bytes;
  }
};

// Bytes that are known of a row besides its logits: of each block of classes, and once.
template <typename acc_t>
int64_t row_bytes(int64_t classes) {
  const int64_t values = ceil_div(classes, kSumClasses) * RowSums<acc_t>::kFields + RowGradients<acc_t>::kFields + 1;
  return values * static_cast<int64_t>(sizeof(acc_t));
}

// The products are computed with operands of type operand_t. There is at least one row.
template <typename scalar_t, typename operand_t>
Plan make_plan(const LinearCrossEntropy<scalar_t>& args) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int64_t size = sizeof(operand_t), acc_size = sizeof(acc_t);
  Plan plan{args.rows, round_up(args.rows, kRowMultiple), 0, 0, 0, 0, 0};
  if (args.gradient_scale == nullptr) {
    return plan;
  }
  const bool with_loss = args.losses != nullptr;
  const int64_t limit = args.memory_limit - std::min(args.memory_limit / 8, kForScratch);
  if (!is_half<scalar_t> && with_loss) {
    // With a shift for every tile.
    const int64_t kept = args.classes * size + ceil_div(args.classes, kTileClasses) * acc_size;
    int64_t rows = limit / (kept + row_bytes<acc_t>(args.classes));
    rows -= rows % (rows >= kTileRows ? kTileRows : kRowMultiple);
    rows = std::min(rows, plan.stride);
    if (rows >= std::min(plan.stride, kLeastChunk)) {
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
    const int64_t slice = std::max(with_loss ? fitting / kSliceShare : fitting, kLeastSlice);
    plan.slice = std::min(slice / kTileClasses * kTileClasses, args.classes);
    plan.kept = with_loss ? std::max<int64_t>(0, fitting - plan.slice) / kTileClasses * kTileClasses : 0;
  }
  plan.kept_bytes = plan.kept * class_bytes;
  plan.slice_bytes = plan.slice * class_bytes;
  return plan;
}

}  // namespace lightkit::cpu
