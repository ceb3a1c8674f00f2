// The gradients, as sums over the live outputs alone.
//
// A live output adds its gradient times a patch of the input to the gradient of the weight, and its gradient times
// the weight of its channel to a patch of the gradient of the input. With the channels last a row of a patch is one
// run of memory. So both are the same work: sum over a list of (coefficient, where a patch begins), the sums kept in
// registers. The lists are made without a branch that depends on the data, which would be mispredicted all the time.

#include "conv_relu_pool_backward.h"

#include <ATen/Parallel.h>

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
constexpr int64_t kChannels = 8;

// Bytes of input that stay in the first-level cache while the lists of kChannels channels are worked off.
constexpr int64_t kCachedBytes = 24 * 1024;

template <typename T>
struct Entry {
  int32_t offset;
  T coefficient;
};

// target[r][v] += sum over the entries of coefficient * source[offset + r * source_row + v], for whole vectors of
// which the last has `last` lanes that count in the target.
template <typename T, int rows, int vectors>
void accumulate(
    const Entry<T>* entries,
    int64_t count,
    const T* source,
    int64_t source_row,
    T* target,
    int64_t target_row,
    int64_t last) {
  constexpr int width = kWidth<T>;
  // A multiply-add takes several cycles: with few sums the entries take turns between two or four sets of them.
  constexpr int size = rows * vectors;
  constexpr int sets = size * 4 <= kSums ? 4 : size * 2 <= kSums ? 2 : 1;
  Vec<T> sums[sets][rows][vectors];
  LIGHTKIT_UNROLL for (int s = 0; s < sets; ++s) {
    LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
      LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
        sums[s][r][v] = Vec<T>(T(0));
      }
    }
  }
  for (; count >= sets; count -= sets, entries += sets) {
    LIGHTKIT_UNROLL for (int s = 0; s < sets; ++s) {
      const Vec<T> coefficient(entries[s].coefficient);
      const T* from = source + entries[s].offset;
      LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r, from += source_row) {
        LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
          sums[s][r][v] = at::vec::fmadd(coefficient, Vec<T>::loadu(from + v * width), sums[s][r][v]);
        }
      }
    }
  }
  for (; count > 0; --count, ++entries) {
    const Vec<T> coefficient(entries->coefficient);
    const T* from = source + entries->offset;
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
using Accumulate =
    void (*)(const Entry<T>*, int64_t, const T*, int64_t, T*, int64_t, int64_t);

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

template <typename T>
std::vector<Segment<T>> make_segments(const ConvReluPoolShape& shape) {
  const int64_t vectors = (shape.run() + kWidth<T> - 1) / kWidth<T>;
  const int64_t tiles = (vectors + kMostVectors - 1) / kMostVectors;
  const int64_t most_rows = std::min<int64_t>({kMostRows, shape.kernel_height, kSums / ((vectors + tiles - 1) / tiles)});
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

// One list for each of `count` receivers. The space between them keeps them apart in the cache.
template <typename T>
class Lists {
 public:
  Lists(int64_t count, int64_t capacity) : stride_(capacity + 8), entries_(count * stride_), ends_(count) {}

  void clear() {
    for (size_t list = 0; list < ends_.size(); ++list) {
      ends_[list] = entries_.data() + list * stride_;
    }
  }
  // Where the lists end, for `append`: a copy of the pointer spares loading it for every entry.
  Entry<T>** ends() {
    return ends_.data();
  }
  const Entry<T>* entries(int64_t list) const {
    return entries_.data() + list * stride_;
  }
  int64_t size(int64_t list) const {
    return ends_[list] - entries(list);
  }

 private:
  const int64_t stride_;
  AlignedBuffer<Entry<T>> entries_;
  std::vector<Entry<T>*> ends_;
};

// Counted only if it is live: what is not is overwritten by the next.
template <typename T>
inline void append(Entry<T>*& end, int64_t offset, T coefficient, bool live) {
  Entry<T>* const entry = end;
  entry->offset = static_cast<int32_t>(offset);
  entry->coefficient = coefficient;
  end = entry + live;
}

// The weight as (out_channels, kernel_height, padded run).
template <typename T>
AlignedBuffer<T> pack(const ConvReluPoolShape& shape, const ConvKernel<const T>& weight) {
  const int64_t run = padded_run<T>(shape);
  AlignedBuffer<T> packed(shape.out_channels * shape.kernel_height * run);
  at::parallel_for(0, shape.out_channels, conv_grain(8 * shape.taps()), [&](int64_t begin, int64_t end) {
    T* to = packed.data() + begin * shape.kernel_height * run;
    for (int64_t out = begin; out < end; ++out) {
      for (int64_t row = 0; row < shape.kernel_height; ++row, to += run) {
        for (int64_t column = 0; column < shape.kernel_width; ++column) {
          for (int64_t in = 0; in < shape.in_channels; ++in) {
            to[column * shape.in_channels + in] = weight.at(out, in, row, column);
          }
        }
        std::fill(to + shape.run(), to + run, T(0));
      }
    }
  });
  return packed;
}

// (kChannels, kernel_height, padded run) into some channels of the weight's gradient.
template <typename T>
void unpack(
    const ConvReluPoolShape& shape, const T* packed, const ConvKernel<T>& grad_weight, int64_t channel, int64_t channels) {
  const int64_t run = padded_run<T>(shape);
  for (int64_t out = channel; out < channel + channels; ++out) {
    for (int64_t in = 0; in < shape.in_channels; ++in) {
      for (int64_t row = 0; row < shape.kernel_height; ++row) {
        for (int64_t column = 0; column < shape.kernel_width; ++column) {
          grad_weight.at(out, in, row, column) =
              packed[((out - channel) * shape.kernel_height + row) * run + column * shape.in_channels + in];
        }
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
    const ConvKernel<const T>& weight,
    T* grad_input) {
  const auto packed = pack(shape, weight);
  const auto segments = make_segments<T>(shape);
  const auto quad_offsets = shape.quad_offsets();
  const int64_t channels = shape.out_channels;
  const int64_t run = padded_run<T>(shape);
  const int64_t patch = shape.kernel_height * run;
  const int64_t quads = shape.quads();
  const int64_t positions = shape.rows() * shape.columns();
  // Outputs whose lists are made at once, taking turns: an append waits for the one before to the same list.
  const int64_t group = std::clamp<int64_t>(8192 / (quads * channels), 4, 32);

  at::parallel_for(0, shape.images, conv_grain(products(shape)), [&](int64_t begin, int64_t end) {
    Lists<T> lists(group * quads, channels);
    for (int64_t image = begin; image < end; ++image) {
      T* target = grad_input + image * shape.image_size();
      std::fill_n(target, shape.image_size(), T(0));
      OutputCursor cursor(shape, image * positions);
      for (int64_t first = 0; first < positions; first += group) {
        const int64_t count = std::min(group, positions - first);
        const T* grads = grad_output + (image * positions + first) * channels;
        const uint8_t* winners = index + (image * positions + first) * channels;
        lists.clear();
        for (int64_t p = 0; p < count; p += 4) {
          const int64_t together = std::min<int64_t>(4, count - p);
          Entry<T>** ends = lists.ends() + p * quads;
          const auto append_channel = [&](int64_t c, int64_t k) {
            const uint8_t winner = winners[(p + k) * channels + c];
            append(
                ends[k * quads + (winner & (quads - 1))], c * patch, grads[(p + k) * channels + c], winner != kDead);
          };
          if (together == 4) {
            for (int64_t c = 0; c < channels; ++c) {
              LIGHTKIT_UNROLL for (int64_t k = 0; k < 4; ++k) {
                append_channel(c, k);
              }
            }
          } else {
            for (int64_t c = 0; c < channels; ++c) {
              for (int64_t k = 0; k < together; ++k) {
                append_channel(c, k);
              }
            }
          }
        }
        int64_t offsets[32];
        for (int64_t p = 0; p < count; ++p, cursor.advance()) {
          offsets[p] = cursor.offset();
        }
        // All outputs for one segment of the weights, which stays in the cache meanwhile.
        for (const auto& segment : segments) {
          for (int64_t list = 0; list < count * quads; ++list) {
            if (lists.size(list) > 0) {
              segment.accumulate(
                  lists.entries(list),
                  lists.size(list),
                  packed.data() + segment.row * run + segment.start,
                  run,
                  target + offsets[list / quads] + quad_offsets[list % quads] + segment.row * shape.row_size() +
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
    const ConvKernel<T>& grad_weight,
    T* grad_bias) {
  if (is_thin<T>(shape)) {
    return thin_grad_weight(shape, grad_output, index, input, grad_weight, grad_bias);
  }
  const auto segments = make_segments<T>(shape);
  const int64_t run = padded_run<T>(shape);
  const int64_t patch = shape.kernel_height * run;
  const int64_t total = shape.outputs();
  const int64_t positions = shape.rows() * shape.columns();
  // Indexed by winner; what is dead goes nowhere.
  std::array<int64_t, kDead + 1> quad_offsets{};
  std::copy_n(shape.quad_offsets().begin(), 4, quad_offsets.begin());
  // Outputs of a list: whole images if they are small, else a part of one.
  const int64_t cached = kCachedBytes / static_cast<int64_t>(sizeof(T)) / shape.image_size();
  const int64_t most = positions > 128 ? 128 : positions * std::clamp<int64_t>(cached, 1, 128 / positions);

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
      const int64_t channels = std::min(kChannels, shape.out_channels - channel);
      std::fill_n(sums.data(), kChannels * patch, T(0));
      T bias_sums[kChannels] = {};
      OutputCursor cursor(shape, 0);
      for (int64_t first = 0, last; first < total; first = last) {
        const bool in_last = first >= last_image * positions;
        last = std::min(first + most, in_last ? total : last_image * positions);
        const int64_t base = cursor.image() * shape.image_size();
        lists.clear();
        Entry<T>** ends = lists.ends();
        for (int64_t o = first; o < last; ++o, cursor.advance()) {
          const int64_t offset = cursor.image() * shape.image_size() + cursor.offset() - base;
          const T* grads = grad_output + o * shape.out_channels + channel;
          const uint8_t* winners = index + o * shape.out_channels + channel;
          const auto append_channel = [&](int64_t c) {
            append(ends[c], offset + quad_offsets[winners[c]], grads[c], winners[c] != kDead);
          };
          if (channels == kChannels) {
            LIGHTKIT_UNROLL for (int64_t c = 0; c < kChannels; ++c) {
              append_channel(c);
            }
          } else {
            for (int64_t c = 0; c < channels; ++c) {
              append_channel(c);
            }
          }
        }
        const T* source = in_last && !copy_of_last.empty() ? copy_of_last.data() : input + base;
        for (int64_t c = 0; c < channels; ++c) {
          for (const auto& segment : segments) {
            segment.accumulate(
                lists.entries(c),
                lists.size(c),
                source + segment.row * shape.row_size() + segment.start,
                shape.row_size(),
                sums.data() + c * patch + segment.row * run + segment.start,
                run,
                kWidth<T>);
          }
          T bias_sum = 0;
          for (int64_t i = 0; i < lists.size(c); ++i) {
            bias_sum += lists.entries(c)[i].coefficient;
          }
          bias_sums[c] += bias_sum;
        }
      }
      unpack(shape, sums.data(), grad_weight, channel, channels);
      std::copy_n(bias_sums, channels, grad_bias + channel);
    }
  });
}

template void conv_relu_pool_grad_input(
    const ConvReluPoolShape&, const float*, const uint8_t*, const ConvKernel<const float>&, float*);
template void conv_relu_pool_grad_input(
    const ConvReluPoolShape&, const double*, const uint8_t*, const ConvKernel<const double>&, double*);
template void conv_relu_pool_grad_weight(
    const ConvReluPoolShape&, const float*, const uint8_t*, const float*, const ConvKernel<float>&, float*);
template void conv_relu_pool_grad_weight(
    const ConvReluPoolShape&, const double*, const uint8_t*, const double*, const ConvKernel<double>&, double*);

}  // namespace lightkit::cpu
