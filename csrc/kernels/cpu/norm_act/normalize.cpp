// The forward pass over the rows: scale and shift, residual, ReLU and max-pool.

#include "groups.h"
#include "passes.h"

namespace lightkit::cpu::norm_act {
namespace {

template <typename T, typename G>
void normalize_rows(const Forward<T>& f, const G& group, int64_t begin, int64_t end) {
  const int64_t channels = f.shape.channels;
  typename G::Array scale, shift;
  group.load(f.scale, scale);
  group.load(f.shift, shift);
  for (int64_t row = begin; row < end; ++row) {
    uint64_t bits = 0;
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      auto y = group.load(f.input + row * channels, v) * scale[v] + shift[v];
      if (f.residual != nullptr) {
        y += group.load(f.residual + row * channels, v);
      }
      if (f.shape.relu()) {
        // NaN <= 0 is false: the ReLU returns NaN.
        y = y <= Lanes<T>{} ? Lanes<T>{} : y;
        if (f.live != nullptr) {
          bits |= static_cast<uint64_t>(nonzero_lanes<T>(y)) << v * kWidth<T>;
        }
      }
      group.store(y, f.output + row * channels, v);
    }
    if (f.live != nullptr) {
      group.store_bits(bits, f.live + row * f.shape.bit_bytes());
    }
  }
}

template <typename T, typename G>
void normalize_windows(const Forward<T>& f, const G& group, int64_t begin, int64_t end) {
  using Values = Lanes<T>;
  using Numbers = LaneNumbers<T>;
  const int64_t channels = f.shape.channels;
  const int64_t image_row = f.shape.width * channels;
  const int64_t offsets[] = {0, channels, image_row, image_row + channels};
  typename G::Array scale, shift;
  group.load(f.scale, scale);
  group.load(f.shift, shift);
  WindowCursor cursor(f.shape, begin);
  for (int64_t window = begin; window < end; ++window, cursor.advance()) {
    const int64_t at = cursor.row() * channels;
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      Values best{};
      Numbers winner{};
      LIGHTKIT_UNROLL
      for (int q = 0; q < 4; ++q) {
        Values y = group.load(f.input + at + offsets[q], v) * scale[v] + shift[v];
        if (f.residual != nullptr) {
          y += group.load(f.residual + at + offsets[q], v);
        }
        if (q == 0) {
          best = y;
        } else {
          // The second comparison lets NaN win.
          const auto wins = (y > best) | (y != y);
          best = wins ? y : best;
          winner = wins ? Numbers{} + q : winner;
        }
      }
      const auto dead = f.shape.relu() ? best <= Values{} : Numbers{};
      group.store(dead ? Values{} : best, f.output + window * channels, v);
      if (f.live != nullptr) {
        winner = dead ? Numbers{} + kDead : winner;
        group.store_bytes(__builtin_convertvector(winner, LaneBytes<T>), f.live + window * channels, v);
      }
    }
  }
}

}  // namespace

template <typename T>
void normalize_tile(const Forward<T>& f, int64_t begin, int64_t end) {
  for_each_group<T>(f.shape.channels, [&](auto group) {
    if (f.shape.is_max()) {
      normalize_windows(f, group, begin, end);
    } else {
      normalize_rows(f, group, begin, end);
    }
  });
}

template <typename T>
void normalize(const Forward<T>& f) {
  if (f.shape.is_mean()) {
    normalize_and_average(f);
    return;
  }
  if (f.shape.activation.is_general()) {
    normalize_and_activate(f);
    return;
  }
  const int64_t elements = (f.shape.is_max() ? 4 : 1) * f.shape.channels;
  for_each_tile<T>(f.shape.out_rows(), elements, [&](int64_t begin, int64_t end) { normalize_tile(f, begin, end); });
}

template void normalize_tile(const Forward<float>&, int64_t, int64_t);
template void normalize_tile(const Forward<double>&, int64_t, int64_t);
template void normalize(const Forward<float>&);
template void normalize(const Forward<double>&);

}  // namespace lightkit::cpu::norm_act
