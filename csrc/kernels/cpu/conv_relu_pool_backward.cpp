// The gradients, as sums over the live outputs alone.
//
// A live output adds its gradient times a patch of the input to the gradient of the weight, and its gradient times
// the weight of its channel to a patch of the gradient of the input. With the channels last a row of a patch is one
// run of memory. So both are the same work: sum over a list of (coefficient, where a patch begins), the sums kept in
// registers.

#include "conv_relu_pool_backward.h"
#include "conv_relu_pool_lists.h"

#include <ATen/Parallel.h>

#include <numeric>
#include <utility>
#include <vector>

namespace lightkit::cpu {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr int kWidth = Vec<T>::size();

// Sums that registers hold beside a coefficient; a sum of several rows of a patch shares it.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif
constexpr int kMostRows = 3;
constexpr int kMostVectors = 12;

// Channels whose lists are made together, so that the gradients are read in runs.
constexpr int kChannels = 8;

// Outputs that they list at once.
constexpr int64_t kMostOutputs = 128;

// For the gradient of the input, outputs whose lists are made together, and channels of each.
constexpr int64_t kGroup = 32;
constexpr int64_t kListed = 64;

// Bytes of input that stay in the first-level cache while the lists of kChannels channels are worked off.
constexpr int64_t kCachedBytes = 24 * 1024;

// target[r][v] += sum over a list of coefficient * source[offset + r * source_row + v], for whole vectors of which
// the last has `last` lanes that count in the target.
template <typename T, int rows, int vectors>
void accumulate(
    const List<T>& list, const T* source, int64_t source_row, T* target, int64_t target_row, int64_t last) {
  constexpr int width = kWidth<T>;
  // A multiply-add takes four cycles, in each of which two begin: with few sums the entries take turns between two
  // sets of them. More would not pay, as the lists are short.
  constexpr int sets = rows * vectors >= 8 ? 1 : 2;
  Vec<T> sums[sets][rows][vectors];
  LIGHTKIT_UNROLL for (int s = 0; s < sets; ++s) {
    LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        sums[s][r][v] = Vec<T>(T(0));
      }
    }
  }
  int64_t i = 0;
  for (; i + sets <= list.size; i += sets) {
    LIGHTKIT_UNROLL for (int s = 0; s < sets; ++s) {
      const Vec<T> coefficient(list.coefficients[i + s]);
      const T* from = source + list.offsets[i + s];
      LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r, from += source_row) {
        LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
          sums[s][r][v] = at::vec::fmadd(coefficient, Vec<T>::loadu(from + v * width), sums[s][r][v]);
        }
      }
    }
  }
  for (; i < list.size; ++i) {
    const Vec<T> coefficient(list.coefficients[i]);
    const T* from = source + list.offsets[i];
    LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r, from += source_row) {
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        sums[0][r][v] = at::vec::fmadd(coefficient, Vec<T>::loadu(from + v * width), sums[0][r][v]);
      }
    }
  }
  LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
      Vec<T> sum = sums[0][r][v];
      LIGHTKIT_UNROLL for (int s = 1; s < sets; ++s) {
        sum = sum + sums[s][r][v];
      }
      T* to = target + r * target_row + v * width;
      if (v + 1 < vectors || last == width) {
        (Vec<T>::loadu(to) + sum).store(to);
      } else {
        (Vec<T>::loadu(to, last) + sum).store(to, static_cast<int>(last));
      }
    }
  }
}

template <typename T>
using Accumulate = void (*)(const List<T>&, const T*, int64_t, T*, int64_t, int64_t);

template <typename T, int rows, int vectors>
constexpr Accumulate<T> accumulate_or_null() {
  if constexpr (rows * vectors <= kSums) {
    return accumulate<T, rows, vectors>;
  } else {
    return nullptr;
  }
}

template <typename T, int rows, int... v>
Accumulate<T> find_vectors(int64_t vectors, std::integer_sequence<int, v...>) {
  static constexpr Accumulate<T> table[] = {accumulate_or_null<T, rows, v + 1>()...};
  return table[vectors - 1];
}

template <typename T>
Accumulate<T> find_accumulate(int64_t rows, int64_t vectors) {
  constexpr auto all = std::make_integer_sequence<int, kMostVectors>{};
  return rows == 1 ? find_vectors<T, 1>(vectors, all)
      : rows == 2  ? find_vectors<T, 2>(vectors, all)
                   : find_vectors<T, 3>(vectors, all);
}

// A part of a patch that one call of `accumulate` sums: some of its rows, some vectors of each.
template <typename T>
struct Segment {
  int64_t row;
  int64_t start;  // within the run
  int64_t last;   // lanes of the last vector
  Accumulate<T> accumulate;
};

// Of at most so many vectors, and at least one.
template <typename T>
std::vector<Segment<T>> make_segments(const ConvReluPoolShape& shape, int64_t most) {
  most = std::clamp<int64_t>(most, 1, kSums);
  const int64_t vectors = (shape.run() + kWidth<T> - 1) / kWidth<T>;
  const int64_t most_vectors = std::min<int64_t>(most, kMostVectors);
  const int64_t tiles = (vectors + most_vectors - 1) / most_vectors;
  const int64_t most_rows = std::min<int64_t>({kMostRows, shape.kernel_height, most / ((vectors + tiles - 1) / tiles)});
  std::vector<Segment<T>> segments;
  for (int64_t row = 0; row < shape.kernel_height; row += most_rows) {
    const int64_t rows = std::min(most_rows, shape.kernel_height - row);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = t * vectors / tiles;
      const int64_t to = (t + 1) * vectors / tiles;
      const int64_t last = std::min<int64_t>(kWidth<T>, shape.run() - (to - 1) * kWidth<T>);
      segments.push_back({row, from * kWidth<T>, last, find_accumulate<T>(rows, to - from)});
    }
  }
  return segments;
}

// A run filled up to whole vectors.
template <typename T>
int64_t padded_run(const ConvReluPoolShape& shape) {
  return (shape.run() + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// The weight as (out_channels, kernel_height, padded run).
template <typename T>
AlignedBuffer<T> pack(const ConvReluPoolShape& shape, const T* weight) {
  const int64_t run = padded_run<T>(shape);
  AlignedBuffer<T> packed(shape.out_channels * shape.kernel_height * run);
  at::parallel_for(0, shape.out_channels, conv_grain(kPackingCost * shape.taps()), [&](int64_t begin, int64_t end) {
    T* to = packed.data() + begin * shape.kernel_height * run;
    for (int64_t out = begin; out < end; ++out) {
      const T* from = weight + out * shape.taps();
      for (int64_t row = 0; row < shape.kernel_height; ++row) {
        for (int64_t column = 0; column < shape.kernel_width; ++column, ++from) {
          for (int64_t in = 0; in < shape.in_channels; ++in) {
            *to++ = from[in * shape.kernel_size()];
          }
        }
        to = std::fill_n(to, run - shape.run(), T(0));
      }
    }
  });
  return packed;
}

// (kernel_height, padded run) into one channel of the weight's gradient.
template <typename T>
void unpack(const ConvReluPoolShape& shape, const T* packed, T* grad_weight) {
  const int64_t run = padded_run<T>(shape);
  for (int64_t in = 0; in < shape.in_channels; ++in) {
    for (int64_t row = 0; row < shape.kernel_height; ++row) {
      const T* from = packed + row * run + in;
      for (int64_t column = 0; column < shape.kernel_width; ++column, from += shape.in_channels) {
        *grad_weight++ = *from;
      }
    }
  }
}

// The products of a gradient if every output were live.
int64_t products(const ConvReluPoolShape& shape) {
  return shape.rows() * shape.columns() * shape.out_channels * shape.taps();
}

}  // namespace

template <typename T>
void conv_relu_pool_grad_input(
    const ConvReluPoolShape& shape,
    const T* grad_output,
    const uint8_t* index,
    const T* weight,
    T* grad_input) {
  const auto packed = pack(shape, weight);
  // Of a segment, the weights of the listed channels stay in the first-level cache while all outputs are worked off.
  const int64_t listed = std::min(kListed, shape.out_channels);
  const auto segments = make_segments<T>(shape, kCachedBytes / static_cast<int64_t>(sizeof(T)) / kWidth<T> / listed);
  const auto quad_offsets = shape.quad_offsets();
  const int64_t run = padded_run<T>(shape);
  const int64_t patch = shape.kernel_height * run;
  const int64_t quads = shape.quads();
  const int64_t positions = shape.rows() * shape.columns();
  const auto list = shape.pool ? list_channels<T, 4> : list_channels<T, 1>;

  at::parallel_for(0, shape.images, conv_grain(products(shape)), [&](int64_t begin, int64_t end) {
    Lists<T> lists(kGroup * quads, listed);
    for (int64_t image = begin; image < end; ++image) {
      T* target = grad_input + image * shape.image_size();
      std::fill_n(target, shape.image_size(), T(0));
      OutputCursor cursor(shape, image * positions);
      for (int64_t first = 0; first < positions; first += kGroup) {
        const int64_t count = std::min(kGroup, positions - first);
        int64_t offsets[kGroup];
        for (int64_t p = 0; p < count; ++p, cursor.advance()) {
          offsets[p] = cursor.offset();
        }
        for (int64_t channel = 0; channel < shape.out_channels; channel += listed) {
          lists.clear();
          for (int64_t p = 0; p < count; ++p) {
            const int64_t output = (image * positions + first + p) * shape.out_channels + channel;
            list(
                lists.data() + p * quads,
                grad_output + output,
                index + output,
                std::min(listed, shape.out_channels - channel),
                patch);
          }
          for (const auto& segment : segments) {
            for (int64_t l = 0; l < count * quads; ++l) {
              segment.accumulate(
                  lists.data()[l],
                  packed.data() + channel * patch + segment.row * run + segment.start,
                  run,
                  target + offsets[l / quads] + quad_offsets[l % quads] + segment.row * shape.row_size() +
                      segment.start,
                  shape.row_size(),
                  segment.last);
            }
          }
        }
      }
    }
  });
}

template <typename T>
void conv_relu_pool_grad_weight(
    const ConvReluPoolShape& shape,
    const T* grad_output,
    const uint8_t* index,
    const T* input,
    T* grad_weight,
    T* grad_bias) {
  if (is_thin<T>(shape)) {
    return thin_grad_weight(shape, grad_output, index, input, grad_weight, grad_bias);
  }
  const auto segments = make_segments<T>(shape, kSums);
  const int64_t run = padded_run<T>(shape);
  const int64_t patch = shape.kernel_height * run;
  const int64_t total = shape.outputs();
  const int64_t positions = shape.rows() * shape.columns();
  // Indexed by winner; what is dead, or no winner at all, goes nowhere.
  Moves moves{};
  std::copy_n(shape.quad_offsets().begin(), shape.quads(), moves.begin());
  // Outputs of a list: whole images if they are small, else a part of one.
  const int64_t cached = kCachedBytes / static_cast<int64_t>(sizeof(T)) / shape.image_size();
  const int64_t most =
      positions > kMostOutputs ? kMostOutputs : positions * std::clamp<int64_t>(cached, 1, kMostOutputs / positions);

  // Whole vectors read beyond a run, and so beyond the last image: the sums of those lanes are not used, but there
  // must be memory.
  const int64_t last_image = shape.images - 1;
  std::vector<T> copy_of_last;
  if (run != shape.run()) {
    const T* from = input + last_image * shape.image_size();
    copy_of_last.assign(from, from + shape.image_size());
    copy_of_last.resize(shape.image_size() + kWidth<T>);
  }

  const int64_t blocks = (shape.out_channels + kChannels - 1) / kChannels;
  const int64_t grain = conv_grain(shape.images * products(shape) / blocks);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    Lists<T> lists(kChannels, most);
    AlignedBuffer<T> sums(kChannels * patch);
    for (int64_t channel = begin * kChannels; channel < std::min(end * kChannels, shape.out_channels);
         channel += kChannels) {
      const int64_t channels = std::min<int64_t>(kChannels, shape.out_channels - channel);
      std::fill_n(sums.data(), kChannels * patch, T(0));
      T bias_sums[kChannels] = {};
      OutputCursor cursor(shape, 0);
      for (int64_t first = 0, last; first < total; first = last) {
        const bool in_last = first >= last_image * positions;
        last = std::min(first + most, in_last ? total : last_image * positions);
        const int64_t base = cursor.image() * shape.image_size();
        int32_t places[kMostOutputs];
        for (int64_t o = first; o < last; ++o, cursor.advance()) {
          places[o - first] = static_cast<int32_t>(cursor.image() * shape.image_size() + cursor.offset() - base);
        }
        lists.clear();
        const auto list = [&](auto together, int64_t c) {
          list_outputs<T, together>(
              lists.data() + c,
              grad_output + first * shape.out_channels + channel + c,
              index + first * shape.out_channels + channel + c,
              shape.out_channels,
              places,
              moves,
              last - first);
        };
        if (channels == kChannels) {
          list(std::integral_constant<int, kChannels>{}, 0);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            list(std::integral_constant<int, 1>{}, c);
          }
        }
        const T* source = in_last && !copy_of_last.empty() ? copy_of_last.data() : input + base;
        for (const auto& segment : segments) {
          for (int64_t c = 0; c < channels; ++c) {
            segment.accumulate(
                lists.data()[c],
                source + segment.row * shape.row_size() + segment.start,
                shape.row_size(),
                sums.data() + c * patch + segment.row * run + segment.start,
                run,
                kWidth<T>);
          }
        }
        for (int64_t c = 0; c < channels; ++c) {
          const List<T>& live = lists.data()[c];
          bias_sums[c] += std::accumulate(live.coefficients, live.coefficients + live.size, T(0));
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        unpack(shape, sums.data() + c * patch, grad_weight + (channel + c) * shape.taps());
      }
      std::copy_n(bias_sums, channels, grad_bias + channel);
    }
  });
}

template void conv_relu_pool_grad_input(
    const ConvReluPoolShape&, const float*, const uint8_t*, const float*, float*);
template void conv_relu_pool_grad_input(
    const ConvReluPoolShape&, const double*, const uint8_t*, const double*, double*);
template void conv_relu_pool_grad_weight(
    const ConvReluPoolShape&, const float*, const uint8_t*, const float*, float*, float*);
template void conv_relu_pool_grad_weight(
    const ConvReluPoolShape&, const double*, const uint8_t*, const double*, double*, double*);

}  // namespace lightkit::cpu
