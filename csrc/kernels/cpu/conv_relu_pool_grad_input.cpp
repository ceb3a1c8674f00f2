// The gradient of the input, from the live outputs alone.
//
// A live output adds its gradient times the weight of its channel to a patch of the gradient. Of one vector of input
// channels, a patch of all positions of an output stays in registers while the live channels are added up, and those
// come from lists by the position that won.

#include "conv_relu_pool_lists.h"

namespace lightkit::cpu {
namespace {

// Of the kernel, what one pass over the lists takes.
constexpr int kMostRows = 3;
constexpr int kMostColumns = 5;

// Outputs whose lists are made together, and channels of each: of one vector of input channels their weights stay in
// the first-level cache.
constexpr int64_t kGroup = 32;
constexpr int64_t kListed = 64;

// Where a patch of the gradient lies.
template <typename T>
struct Patch {
  T* first;
  int64_t row_size;
  int64_t column_size;
  int64_t channels;  // up to a vector
};

// Adds coefficient * weight[offset], (rows, columns) of vectors, for each entry of the lists of the `quads` positions.
template <typename T, int quads, int rows, int columns>
void add_patch(const List<T>* lists, const T* weight, const Patch<T>& patch) {
  constexpr int width = kWidth<T>;
  constexpr int more = quads == 4 ? 1 : 0;
  Vec<T> sums[rows + more][columns + more];
  LIGHTKIT_UNROLL for (int r = 0; r < rows + more; ++r) {
    LIGHTKIT_UNROLL for (int c = 0; c < columns + more; ++c) {
      sums[r][c] = Vec<T>(T(0));
    }
  }
  LIGHTKIT_UNROLL for (int q = 0; q < quads; ++q) {
    const List<T> list = lists[q];
    for (int64_t i = 0; i < list.size; ++i) {
      const Vec<T> coefficient(list.coefficients[i]);
      const T* from = weight + list.offsets[i];
      LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
        LIGHTKIT_UNROLL for (int c = 0; c < columns; ++c) {
          auto& sum = sums[r + q / 2][c + q % 2];
          sum = at::vec::fmadd(coefficient, Vec<T>::loadu(from + (r * columns + c) * width), sum);
        }
      }
    }
  }
  LIGHTKIT_UNROLL for (int r = 0; r < rows + more; ++r) {
    LIGHTKIT_UNROLL for (int c = 0; c < columns + more; ++c) {
      T* const to = patch.first + r * patch.row_size + c * patch.column_size;
      if (patch.channels == width) {
        (Vec<T>::loadu(to) + sums[r][c]).store(to);
      } else {
        const int64_t count = patch.channels;
        (Vec<T>::loadu(to, count) + sums[r][c]).store(to, static_cast<int>(count));
      }
    }
  }
}

template <typename T>
using AddPatch = void (*)(const List<T>*, const T*, const Patch<T>&);

// Null if registers do not hold so many.
template <typename T, int quads>
AddPatch<T> find_add_patch(int64_t rows, int64_t columns) {
  return with_sizes<kMostRows, kMostColumns>(rows, columns, [](auto r, auto c) -> AddPatch<T> {
    constexpr int more = quads == 4 ? 1 : 0;
    if constexpr ((r + more) * (c + more) <= kHeld) {
      return add_patch<T, quads, r, c>;
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
std::vector<KernelPart<T>> make_parts(const ConvReluPoolShape& shape) {
  const auto find = shape.pool ? find_add_patch<T, 4> : find_add_patch<T, 1>;
  const int64_t tiles = (shape.kernel_width + kMostColumns - 1) / kMostColumns;
  int64_t most_rows = std::min<int64_t>(kMostRows, shape.kernel_height);
  while (find(most_rows, (shape.kernel_width + tiles - 1) / tiles) == nullptr) {
    --most_rows;
  }
  std::vector<KernelPart<T>> parts;
  for (int64_t row = 0; row < shape.kernel_height; row += most_rows) {
    const int64_t rows = std::min(most_rows, shape.kernel_height - row);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = t * shape.kernel_width / tiles;
      const int64_t columns = (t + 1) * shape.kernel_width / tiles - from;
      parts.push_back({row, rows, from, columns, find(rows, columns)});
    }
  }
  return parts;
}

// The weights of an output channel in the largest part.
template <typename T>
int64_t largest(const std::vector<KernelPart<T>>& parts) {
  int64_t size = 0;
  for (const auto& part : parts) {
    size = std::max(size, part.rows * part.columns * kWidth<T>);
  }
  return size;
}

template <typename T>
int64_t input_vectors(const ConvReluPoolShape& shape) {
  return (shape.in_channels + kWidth<T> - 1) / kWidth<T>;
}

}  // namespace

template <typename T>
ConvReluPoolGradInput<T>::ConvReluPoolGradInput(const ConvReluPoolShape& shape, const T* weight)
    : shape_(shape),
      weight_(weight),
      parts_(make_parts<T>(shape)),
      part_size_(largest(parts_)),
      packed_(static_cast<int64_t>(parts_.size()) * input_vectors<T>(shape) * shape.out_channels * part_size_) {}

template <typename T>
ConvReluPoolGradInput<T>::~ConvReluPoolGradInput() = default;

template <typename T>
ConvReluPoolGradInput<T>::ConvReluPoolGradInput(ConvReluPoolGradInput&&) noexcept = default;

// Where the packed weight has those of a part of the kernel for a vector of input channels, (out_channels, part_size).
template <typename T>
int64_t ConvReluPoolGradInput<T>::packed_place(size_t part, int64_t vector) const {
  return (static_cast<int64_t>(part) * input_vectors<T>(shape_) + vector) * shape_.out_channels * part_size_;
}

// A unit is an output channel.
template <typename T>
void ConvReluPoolGradInput<T>::prepare(int64_t begin, int64_t end) {
  constexpr int width = kWidth<T>;
  const int64_t stride = shape_.kernel_size();
  for (size_t p = 0; p < parts_.size(); ++p) {
    const auto& part = parts_[p];
    for (int64_t vector = 0; vector < input_vectors<T>(shape_); ++vector) {
      const int64_t channels = std::min<int64_t>(width, shape_.in_channels - vector * width);
      for (int64_t out = begin; out < end; ++out) {
        const T* from = weight_ + out * shape_.taps() + vector * width * stride;
        T* to = packed_.data() + packed_place(p, vector) + out * part_size_;
        for (int64_t row = part.row; row < part.row + part.rows; ++row) {
          for (int64_t column = part.column; column < part.column + part.columns; ++column, to += width) {
            const T* tap = from + row * shape_.kernel_width + column;
            for (int64_t lane = 0; lane < width; ++lane) {
              to[lane] = lane < channels ? tap[lane * stride] : T(0);
            }
          }
        }
      }
    }
  }
}

template <typename T>
void ConvReluPoolGradInput<T>::run(
    int64_t images, const T* grad_output, const uint8_t* index, T* grad_input) const {
  const int64_t listed = std::min(kListed, shape_.out_channels);
  const int64_t quads = shape_.quads();
  const int64_t positions = shape_.positions();
  const auto list = shape_.pool ? list_channels<T, 4> : list_channels<T, 1>;
  // Whole images or a part of one: in which order an image's sums are added does not depend on the others.
  const int64_t images_of_group = std::max<int64_t>(1, kGroup / positions);

  std::fill_n(grad_input, images * shape_.image_size(), T(0));
  Lists<T> lists(kGroup * quads, listed);
  OutputCursor cursor(shape_);
  for (int64_t image = 0; image < images; image += images_of_group) {
    const int64_t end = std::min(images, image + images_of_group) * positions;
    for (int64_t first = image * positions; first < end; first += kGroup) {
      const int64_t count = std::min(kGroup, end - first);
      int64_t offsets[kGroup];
      for (int64_t p = 0; p < count; ++p, cursor.advance()) {
        offsets[p] = cursor.offset();
      }
      for (int64_t channel = 0; channel < shape_.out_channels; channel += listed) {
        lists.clear();
        for (int64_t p = 0; p < count; ++p) {
          const int64_t output = (first + p) * shape_.out_channels + channel;
          list(
              lists.data() + p * quads,
              grad_output + output,
              index + output,
              std::min(listed, shape_.out_channels - channel),
              part_size_);
        }
        for (size_t p = 0; p < parts_.size(); ++p) {
          const auto& part = parts_[p];
          for (int64_t vector = 0; vector < input_vectors<T>(shape_); ++vector) {
            const int64_t lane = vector * kWidth<T>;
            const T* weight = packed_.data() + packed_place(p, vector) + channel * part_size_;
            T* const at = grad_input + part.row * shape_.row_size() + part.column * shape_.in_channels + lane;
            for (int64_t o = 0; o < count; ++o) {
              part.add_patch(
                  lists.data() + o * quads,
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

template class ConvReluPoolGradInput<float>;
template class ConvReluPoolGradInput<double>;

}  // namespace lightkit::cpu
