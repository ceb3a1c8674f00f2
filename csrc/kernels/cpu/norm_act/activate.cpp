// The passes with a general activation function: forward, and the gradient of the values before the function.

#include "../common/aligned_buffer.h"
#include "groups.h"
#include "passes.h"

#include <algorithm>

namespace lightkit::cpu::norm_act {
namespace {

// Two rows of an image, which a row of the output is pooled from.
template <typename T>
class ImageRows {
 public:
  explicit ImageRows(const Shape& shape)
      : count_(2 * shape.width * shape.channels), values_(count_), ones_(shape.channels), zeros_(shape.channels) {
    std::fill_n(ones_.data(), shape.channels, T(1));
    std::fill_n(zeros_.data(), shape.channels, T(0));
  }

  // Computes the values behind the function of the rows from `first` on.
  void compute(const Forward<T>& f, int64_t first) {
    const int64_t rows = 2 * f.shape.width;
    normalize_tile(rows_without_pool(f, first, rows, values_.data()), 0, rows);
    activate(f.shape.activation, values_.data(), count_);
  }

  // Pools the values into a row of the output.
  void pool(const Forward<T>& f, int64_t out_row) const {
    const int64_t at = out_row * f.shape.out_width() * f.shape.channels;
    const Forward<T> windows{
        .shape = {1, 2, f.shape.width, f.shape.channels, {Kind::None, 0, 0}, Pool::Max},
        .input = values_.data(),
        .residual = nullptr,
        .scale = ones_.data(),
        .shift = zeros_.data(),
        .output = f.output + at,
        .live = f.live == nullptr ? nullptr : f.live + at,
    };
    normalize_tile(windows, 0, windows.shape.out_rows());
  }

 private:
  const int64_t count_;
  AlignedBuffer<T> values_, ones_, zeros_;
};

// Computes the values before the function where the outputs of windows come from.
template <typename T, typename G>
void normalize_winners(
    const Forward<T>& f, const uint8_t* live, const G& group, int64_t begin, int64_t end, T* winners) {
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
      const auto argmax = __builtin_convertvector(group.load_bytes(live + window * channels, v), Numbers);
      const auto of_winner = [&](const T* from) {
        auto value = group.load(from + at, v);
        LIGHTKIT_UNROLL
        for (int q = 1; q < 4; ++q) {
          value = argmax == Numbers{} + q ? group.load(from + at + offsets[q], v) : value;
        }
        return value;
      };
      auto y = of_winner(f.input) * scale[v] + shift[v];
      if (f.residual != nullptr) {
        y += of_winner(f.residual);
      }
      group.store(y, winners + (window - begin) * channels, v);
    }
  }
}

}  // namespace

template <typename T>
void normalize_and_activate(const Forward<T>& f) {
  const Shape& shape = f.shape;
  const int64_t channels = shape.channels;
  if (shape.is_max() && !shape.activation.is_increasing()) {
    const int64_t height = shape.out_height();
    for_each_tile<T>(shape.images * height, 2 * shape.width * channels, [&](int64_t begin, int64_t end) {
      ImageRows<T> rows(shape);
      for (int64_t out_row = begin; out_row < end; ++out_row) {
        rows.compute(f, (out_row / height * shape.height + 2 * (out_row % height)) * shape.width);
        rows.pool(f, out_row);
      }
    });
    return;
  }
  // The largest value of a window stays the largest.
  for_each_tile<T>(shape.out_rows(), (shape.is_max() ? 4 : 1) * channels, [&](int64_t begin, int64_t end) {
    normalize_tile(f, begin, end);
    activate(shape.activation, f.output + begin * channels, (end - begin) * channels);
  });
}

template <typename T>
void differentiate_rows(const ActivationGradient<T>& p) {
  const Forward<T>& f = p.forward;
  const int64_t channels = f.shape.channels;
  for_each_tile<T>(f.shape.gradient_rows(), (f.shape.is_max() ? 4 : 1) * channels, [&](int64_t begin, int64_t end) {
    T* const g = f.output + begin * channels;
    if (f.shape.is_max()) {
      for_each_group<T>(channels, [&](auto group) { normalize_winners(f, p.live, group, begin, end, g); });
    } else {
      normalize_tile(f, begin, end);
    }
    if (!f.shape.is_mean()) {
      differentiate(f.shape.activation, g, p.grad_output + begin * channels, g, (end - begin) * channels);
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      T* const of_row = g + (row - begin) * channels;
      const T* const upstream = p.grad_output + row / f.shape.image_rows() * channels;
      differentiate(f.shape.activation, of_row, upstream, of_row, channels);
    }
  });
}

template void normalize_and_activate(const Forward<float>&);
template void normalize_and_activate(const Forward<double>&);
template void differentiate_rows(const ActivationGradient<float>&);
template void differentiate_rows(const ActivationGradient<double>&);

}  // namespace lightkit::cpu::norm_act
