#include "channels_last.h"

#include "../common/pieces.h"

namespace lightkit::cpu::layer_chain {
namespace {

// Multiply-adds that take as long as moving one value does. Chosen.
constexpr int64_t kMovingMacs = 4;

template <int channels, typename T>
void lay_out_image(
    int64_t rows, int64_t columns, const std::array<int64_t, 2>& padding, const T* from, T* __restrict to) {
  const int64_t plane = rows * columns;
  const int64_t border = padding[0] * (columns + 2 * padding[1]) * channels;
  const int64_t side = padding[1] * channels;
  to = std::fill_n(to, border, T(0));
  for (int64_t row = 0; row < rows; ++row, from += columns) {
    to = std::fill_n(to, side, T(0));
    for (int64_t column = 0; column < columns; ++column) {
      for (int c = 0; c < channels; ++c) {
        to[column * channels + c] = from[c * plane + column];
      }
    }
    to = std::fill_n(to + columns * channels, side, T(0));
  }
  std::fill_n(to, border, T(0));
}

}  // namespace

template <typename T>
void to_channels_last(
    const std::array<int64_t, 4>& sizes, const std::array<int64_t, 2>& padding, const T* from, T* to) {
  const auto [images, channels, rows, columns] = sizes;
  const auto lay_out = channels == 2 ? lay_out_image<2, T> : channels == 3 ? lay_out_image<3, T> : lay_out_image<4, T>;
  const int64_t image = channels * rows * columns;
  const int64_t padded = channels * (rows + 2 * padding[0]) * (columns + 2 * padding[1]);
  in_pieces(images, 1, images * padded * kMovingMacs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      lay_out(rows, columns, padding, from + i * image, to + i * padded);
    }
  });
}

template void to_channels_last(const std::array<int64_t, 4>&, const std::array<int64_t, 2>&, const float*, float*);
template void to_channels_last(const std::array<int64_t, 4>&, const std::array<int64_t, 2>&, const double*, double*);

}  // namespace lightkit::cpu::layer_chain
