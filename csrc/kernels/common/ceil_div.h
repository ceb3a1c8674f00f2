// Integer division that rounds up. CUDA kernels call these functions, too (--expt-relaxed-constexpr).
#pragma once

#include <type_traits>

namespace lightkit {

// `value` is at least 0 and `divisor` is above 0.
template <typename A, typename B>
constexpr std::common_type_t<A, B> ceil_div(A value, B divisor) {
  return (value + divisor - 1) / divisor;
}

// The smallest multiple of `multiple` that is at least `value`.
template <typename A, typename B>
constexpr std::common_type_t<A, B> round_up(A value, B multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace lightkit
