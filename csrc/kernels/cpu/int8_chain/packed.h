// How a layer's packed parameters lie in memory.
//
//   bias [lanes] int32, multiplier [lanes] float, weights
//
// The output channels of a group are filled up to vectors of 16 lanes, and `lanes` counts those of all groups. The bias
// holds -zero_point times the sum of the weights, so that the kernel multiplies the inputs as they are.
//
// The inputs of a position are runs of bytes that lie side by side in an image, whose channels are its last dimension:
// a row of the kernel, or one tap of it if dilation or groups leave gaps. The weights of a run are filled up with zeros
// to quads, four inputs for each of 16 lanes: the kernel reads up to three bytes behind a run, and ignores them.
//
//   weights [group][block of up to kBlockVectors vectors][run][quad][vector][lane][input]
#pragma once

#include "../../common/ceil_div.h"
#include "int8_chain.h"
#include "tuning.h"
#include "vectors.h"

#include <algorithm>

namespace lightkit::cpu::int8_chain {

// The bytes that the kernel may read behind an image.
inline constexpr int64_t kReadBehind = 3;

struct Packing {
  int64_t group_in, group_out;  // channels of a group
  int64_t vectors;              // of a group's output channels
  int64_t row_runs;             // runs of a row of the kernel
  int64_t run_bytes;
  int64_t run_quads;
  int64_t quads;  // of all runs
  int64_t lanes;  // of all groups

  explicit Packing(const Shape& s) {
    group_in = s.in_channels / s.groups;
    group_out = s.out_channels / s.groups;
    vectors = ceil_div(group_out, kLanes);
    const bool whole_rows = s.groups == 1 && s.dilation[1] == 1;
    row_runs = whole_rows ? 1 : s.kernel_width;
    run_bytes = whole_rows ? s.kernel_width * group_in : group_in;
    run_quads = ceil_div(run_bytes, 4);
    quads = s.kernel_height * row_runs * run_quads;
    lanes = s.groups * vectors * kLanes;
  }

  int64_t multiplier_offset() const {
    return lanes * int64_t(sizeof(int32_t));
  }
  int64_t weight_offset() const {
    return 2 * multiplier_offset();
  }
  // Returns the bytes of the weights of a vector.
  int64_t vector_bytes() const {
    return quads * kWeightBytes;
  }
  int64_t bytes() const {
    return weight_offset() + lanes / kLanes * vector_bytes();
  }
  // Returns the vectors in the block that has a vector of a group.
  int64_t block_vectors(int64_t vector) const {
    const int64_t first = vector / kBlockVectors * kBlockVectors;
    return std::min<int64_t>(kBlockVectors, vectors - first);
  }
  // Returns the offset of the first quad of a vector; the next quad is block_vectors * kWeightBytes further on.
  int64_t vector_offset(int64_t group, int64_t vector) const {
    const int64_t first = vector / kBlockVectors * kBlockVectors;
    return weight_offset() + (group * vectors + first) * vector_bytes() + (vector - first) * kWeightBytes;
  }
};

}  // namespace lightkit::cpu::int8_chain
