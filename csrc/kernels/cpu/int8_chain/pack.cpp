#include "packed.h"

#include <cstring>

namespace lightkit::cpu::int8_chain {

int64_t packed_bytes(const Shape& shape) {
  return Packing(shape).bytes();
}

void pack(const Shape& shape, const Parameters& parameters, uint8_t* packed) {
  const Packing p(shape);
  std::memset(packed, 0, p.bytes());
  const int64_t pixels = shape.in_channels / parameters.channels_before;
  // Returns the weight of an input of a run, of an output channel.
  const auto weight = [&](int64_t out, int64_t ky, int64_t run, int64_t input) {
    const int64_t kx = p.row_runs == 1 ? input / p.group_in : run;
    int64_t channel = input % p.group_in;
    if (pixels > 1) {
      channel = channel % parameters.channels_before * pixels + channel / parameters.channels_before;
    }
    const int64_t taps = shape.kernel_height * shape.kernel_width;
    return parameters.weight[(out * p.group_in + channel) * taps + ky * shape.kernel_width + kx];
  };
  for (int64_t group = 0; group < shape.groups; ++group) {
    for (int64_t channel = 0; channel < p.group_out; ++channel) {
      const int64_t out = group * p.group_out + channel;
      const int64_t vector = channel / kLanes;
      uint8_t* quad = packed + p.vector_offset(group, vector) + 4 * (channel % kLanes);
      uint32_t sum = 0;
      for (int64_t ky = 0; ky < shape.kernel_height; ++ky) {
        for (int64_t run = 0; run < p.row_runs; ++run) {
          for (int64_t input = 0; input < p.run_bytes; ++input) {
            const int8_t value = weight(out, ky, run, input);
            quad[input / 4 * p.block_vectors(vector) * kWeightBytes + input % 4] = static_cast<uint8_t>(value);
            sum += static_cast<uint32_t>(value);
          }
          quad += p.run_quads * p.block_vectors(vector) * kWeightBytes;
        }
      }
      // Unsigned: sums wrap, as those of the kernel do.
      const uint32_t bias = static_cast<uint32_t>(parameters.bias[out]) - static_cast<uint32_t>(shape.zero_point) * sum;
      const int64_t lane = (group * p.vectors + vector) * kLanes + channel % kLanes;
      std::memcpy(packed + lane * sizeof(bias), &bias, sizeof(bias));
      std::memcpy(packed + p.multiplier_offset() + lane * sizeof(float), parameters.multiplier + out, sizeof(float));
    }
  }
}

}  // namespace lightkit::cpu::int8_chain
