// The layout of a chain's input: images of few channels, as people hand them over, become channels-last.
#pragma once

#include <array>
#include <cstdint>

namespace lightkit::cpu::layer_chain {

// The most channels for which `to_channels_last` has a loop.
inline constexpr int64_t kMaxFewChannels = 4;

// Writes images with their channels last, and zeros around them.
template <typename T>
void to_channels_last(
    const std::array<int64_t, 4>& sizes,  // images, channels (2 to kMaxFewChannels), rows, columns
    const std::array<int64_t, 2>& padding,
    const T* from,  // [images, channels, rows, columns]
    T* to);         // [images, rows + 2 padding[0], columns + 2 padding[1], channels]

}  // namespace lightkit::cpu::layer_chain
