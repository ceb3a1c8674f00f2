// The gradient of the input, summed over the live outputs.
//
// A live output adds its gradient times the weights of its channel to a patch of the input's gradient. For one vector
// of input channels, the patch of a whole window stays in registers while the live channels are added up; they come
// from lists by argmax.

#include "kernels.h"
#include "live_lists.h"
#include "pack_taps.h"
#include "tuning.h"

namespace lightkit::cpu::layer_chain {
// A patch of the gradient of the input, for one vector of input channels.
template <typename T>
struct Patch {
  T* first;  // [rows, columns, channels], rows `row_size` and columns `column_size` apart
  int64_t row_size;
  int64_t column_size;
  int64_t channels;  // at most a vector
};

template <typename T>
using AddPatch = void (*)(const LiveList<T>*, const T*, const Patch<T>&);

namespace {

// Adds coefficient * weight[offset] to the patch for each term of the lists.
template <typename T, int window, int rows, int columns>
void add_patch(
    const LiveList<T>* lists,  // [window]
    const T* weight,           // [out_channels, rows, columns, width]
    const Patch<T>& patch) {
  constexpr int width = kWidth<T>;
  constexpr int more = window == 4 ? 1 : 0;
  Vec<T> sums[rows + more][columns + more];
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows + more; ++r) {
    LIGHTKIT_UNROLL
    for (int c = 0; c < columns + more; ++c) {
      sums[r][c] = Vec<T>(T(0));
    }
  }
  LIGHTKIT_UNROLL
  for (int q = 0; q < window; ++q) {
    const LiveList<T> list = lists[q];
    for (int64_t i = 0; i < list.size; ++i) {
      const Vec<T> coefficient(list.coefficients[i]);
      const T* from = weight + list.offsets[i];
      LIGHTKIT_UNROLL
      for (int r = 0; r < rows; ++r) {
        LIGHTKIT_UNROLL
        for (int c = 0; c < columns; ++c) {
          auto& sum = sums[r + q / 2][c + q % 2];
          sum = at::vec::fmadd(coefficient, Vec<T>::loadu(from + (r * columns + c) * width), sum);
        }
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows + more; ++r) {
    LIGHTKIT_UNROLL
    for (int c = 0; c < columns + more; ++c) {
      T* const to = patch.first + r * patch.row_size + c * patch.column_size;
      store_lanes(load_lanes<Lanes<T>>(to, patch.channels) + lanes<T>(sums[r][c]), to, patch.channels);
    }
  }
}

// Returns null if the sums of the patch do not fit the registers.
template <typename T, int window>
AddPatch<T> find_add_patch(int64_t rows, int64_t columns) {
  return with_sizes<kMaxPartRows, kMaxPartColumns>(rows, columns, [](auto r, auto c) -> AddPatch<T> {
    constexpr int more = window == 4 ? 1 : 0;
    if constexpr ((r + more) * (c + more) <= kHeldVectors) {
      return add_patch<T, window, r, c>;
    } else {
      return nullptr;
    }
  });
}

}  // namespace

template <typename T>
struct KernelPart {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
  AddPatch<T> add_patch;
};

namespace {

template <typename T>
std::vector<KernelPart<T>> make_parts(const Shape& shape) {
  const auto find = shape.pool ? find_add_patch<T, 4> : find_add_patch<T, 1>;
  const int64_t tiles = ceil_div(shape.kernel_width, kMaxPartColumns);
  int64_t max_rows = std::min<int64_t>(kMaxPartRows, shape.kernel_height);
  while (find(max_rows, ceil_div(shape.kernel_width, tiles)) == nullptr) {
    --max_rows;
  }
  std::vector<KernelPart<T>> parts;
  for (int64_t row = 0; row < shape.kernel_height; row += max_rows) {
    const int64_t rows = std::min(max_rows, shape.kernel_height - row);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = t * shape.kernel_width / tiles;
      const int64_t columns = (t + 1) * shape.kernel_width / tiles - from;
      parts.push_back({row, rows, from, columns, find(rows, columns)});
    }
  }
  return parts;
}

// The weights of an output channel in the largest part of the kernel.
template <typename T>
int64_t largest(const std::vector<KernelPart<T>>& parts) {
  int64_t size = 0;
  for (const auto& part : parts) {
    size = std::max(size, part.rows * part.columns * kWidth<T>);
  }
  return size;
}

template <typename T>
int64_t input_vectors(const Shape& shape) {
  return ceil_div(shape.in_channels, kWidth<T>);
}

}  // namespace

template <typename T>
GradInputKernel<T>::GradInputKernel(const Shape& shape, const T* weight)
    : shape_(shape),
      weight_(weight),
      parts_(make_parts<T>(shape)),
      part_size_(largest(parts_)),
      packed_(static_cast<int64_t>(parts_.size()) * input_vectors<T>(shape) * shape.out_channels * part_size_) {}

template <typename T>
GradInputKernel<T>::~GradInputKernel() = default;

template <typename T>
GradInputKernel<T>::GradInputKernel(GradInputKernel&&) noexcept = default;

// The offset in the packed weight of a part of the kernel and a vector of input channels.
template <typename T>
int64_t GradInputKernel<T>::packed_offset(size_t part, int64_t vector) const {
  return (static_cast<int64_t>(part) * input_vectors<T>(shape_) + vector) * shape_.out_channels * part_size_;
}

template <typename T>
void GradInputKernel<T>::prepare(int64_t begin, int64_t end) {
  constexpr int width = kWidth<T>;
  const int64_t taps = shape_.kernel_size();
  // The places of the taps in the packed weight of one output channel.
  std::vector<int64_t> places(taps);
  for (int64_t vector = 0; vector < input_vectors<T>(shape_); ++vector) {
    for (size_t p = 0; p < parts_.size(); ++p) {
      const auto& part = parts_[p];
      for (int64_t i = 0; i < part.rows * part.columns; ++i) {
        const int64_t row = part.row + i / part.columns;
        const int64_t column = part.column + i % part.columns;
        places[row * shape_.kernel_width + column] = packed_offset(p, vector) + i * width;
      }
    }
    const int64_t channels = std::min<int64_t>(width, shape_.in_channels - vector * width);
    for (int64_t out = begin; out < end; ++out) {
      const T* const from = weight_ + out * shape_.taps() + vector * width * taps;
      pack_taps<T>(from, taps, channels, taps, [&, tap = size_t(0)]() mutable {
        return packed_.data() + places[tap++] + out * part_size_;
      });
    }
  }
}

template <typename T>
void GradInputKernel<T>::run(int64_t images, const T* grad_output, const uint8_t* argmax, T* grad_input) const {
  const int64_t listed = std::min(kListedChannels, shape_.out_channels);
  const int64_t window = shape_.window();
  const int64_t positions = shape_.positions();
  const auto list = shape_.pool ? list_channels<T, 4> : list_channels<T, 1>;
  // A group is whole images or a part of one, so that the order of an image's sums does not depend on other images.
  const int64_t images_of_group = std::max<int64_t>(1, kListedOutputs / positions);

  std::fill_n(grad_input, images * shape_.image_size(), T(0));
  LiveLists<T> lists(kListedOutputs * window, listed);
  OutputCursor cursor(shape_);
  for (int64_t image = 0; image < images; image += images_of_group) {
    const int64_t end = std::min(images, image + images_of_group) * positions;
    for (int64_t first = image * positions; first < end; first += kListedOutputs) {
      const int64_t count = std::min(kListedOutputs, end - first);
      int64_t offsets[kListedOutputs];
      for (int64_t p = 0; p < count; ++p, cursor.advance()) {
        offsets[p] = cursor.offset();
      }
      for (int64_t channel = 0; channel < shape_.out_channels; channel += listed) {
        lists.clear();
        for (int64_t p = 0; p < count; ++p) {
          const int64_t output = (first + p) * shape_.out_channels + channel;
          list(
              lists.data() + p * window,
              grad_output + output,
              argmax + output,
              std::min(listed, shape_.out_channels - channel),
              part_size_);
        }
        for (size_t p = 0; p < parts_.size(); ++p) {
          const auto& part = parts_[p];
          for (int64_t vector = 0; vector < input_vectors<T>(shape_); ++vector) {
            const int64_t lane = vector * kWidth<T>;
            const T* weight = packed_.data() + packed_offset(p, vector) + channel * part_size_;
            T* const at = grad_input + part.row * shape_.row_size() + part.column * shape_.in_channels + lane;
            for (int64_t o = 0; o < count; ++o) {
              part.add_patch(
                  lists.data() + o * window,
                  weight,
                  {.first = at + offsets[o],
                   .row_size = shape_.row_size(),
                   .column_size = shape_.in_channels,
                   .channels = std::min<int64_t>(kWidth<T>, shape_.in_channels - lane)});
            }
          }
        }
      }
    }
  }
}

template class GradInputKernel<float>;
template class GradInputKernel<double>;

}  // namespace lightkit::cpu::layer_chain
