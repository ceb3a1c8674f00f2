// Rounds the outputs of a layer to the levels of 8 bits, as `fake_quantize_per_tensor_affine` of torch does.
#pragma once

#include "shape.h"

namespace lightkit::cpu::layer_chain {

// The levels of a quantised output are 0 to kMaxLevel times its scale.
inline constexpr int kMaxLevel = 255;

// Rounds outputs to levels, ties to even, and leaves NaN. No gradient flows to an output above the last level: it gets
// the argmax kDead. A scale of 0 changes nothing.
template <typename T>
void quantize(
    float scale,
    int64_t count,
    T* outputs,         // [count], 0 or more
    uint8_t* argmax) {  // [count], or null
  if (scale == 0) {
    return;
  }
  using Values = Lanes<T>;
  using Numbers = LaneNumbers<T>;
  constexpr int width = kWidth<T>;
  // As in torch, the inverse is rounded to float.
  const T inverse = 1 / scale;
  // Sums with this number have no bits behind the point: 3/2 of a power of two, whose last bit is 1.
  constexpr T rounder = sizeof(T) == 8 ? T(0x1.8p52) : T(0x1.8p23);
  for (int64_t i = 0; i < count; i += width) {
    const int64_t filled = std::min<int64_t>(width, count - i);
    const Values scaled = load_lanes<Values>(outputs + i, filled) * inverse;
    // Values above the last level become it plus 1, so that the sum below is exact.
    const Values bounded = scaled > Values{} + (kMaxLevel + 1) ? Values{} + (kMaxLevel + 1) : scaled;
    const Values level = (bounded + rounder) - rounder;
    const Numbers above = level > Values{} + kMaxLevel;
    store_lanes((above ? Values{} + kMaxLevel : level) * T(scale), outputs + i, filled);
    if (argmax != nullptr) {
      const Numbers before = __builtin_convertvector(load_lanes<LaneBytes<T>>(argmax + i, filled), Numbers);
      store_lanes(__builtin_convertvector(above ? Numbers{} + kDead : before, LaneBytes<T>), argmax + i, filled);
    }
  }
}

}  // namespace lightkit::cpu::layer_chain
