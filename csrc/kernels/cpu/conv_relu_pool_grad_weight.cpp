// The gradient of the weight, from the live outputs alone.
//
// A live output adds its gradient times a patch of the input to the weight of its channel. With the channels last a
// row of a patch is one run of memory. So a channel's gradient is a sum over a list of (coefficient, where a patch
// begins), and is kept in registers.

#include "conv_relu_pool_lists.h"
#include "conv_relu_pool_thin.h"

#include <vector>

namespace lightkit::cpu {
namespace {

// Of a patch, what is summed at once.
constexpr int kMostRows = 3;
constexpr int kMostVectors = 12;

// Channels whose lists are made together, so that the gradients are read in runs.
constexpr int kChannels = 8;

// Outputs that they list at once.
constexpr int64_t kMostOutputs = 128;

// Bytes of input that stay in the first-level cache while lists are worked off.
constexpr int64_t kCachedBytes = 24 * 1024;

// A part of a patch, some of its rows and some vectors of each, and a list of where patches begin.
template <typename T>
struct Part {
  const List<T>& list;
  const T* from;
  int64_t from_row;  // from row to row
  T* to;
  int64_t to_row;
};

// to[r][v] += sum over the list of coefficient * from[offset + r * from_row + v], for whole vectors.
template <typename T, int rows, int vectors>
void accumulate(const Part<T>& part) {
  constexpr int width = kWidth<T>;
  // A multiply-add takes four cycles, in each of which two begin: with few sums the entries take turns between two
  // sets of them. More would not pay, as the lists are short.
  constexpr int sets = rows * vectors >= 8 ? 1 : 2;
  const List<T> list = part.list;
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
      const T* from = part.from + list.offsets[i + s];
      LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r, from += part.from_row) {
        LIGHTKIT_UNROLL for (int v = 0; v < vectors; ++v) {
          sums[s][r][v] = at::vec::fmadd(coefficient, Vec<T>::loadu(from + v * width), sums[s][r][v]);
        }
      }
    }
  }
  for (; i < list.size; ++i) {
    const Vec<T> coefficient(list.coefficients[i]);
    const T* from = part.from + list.offsets[i];
    LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r, from += part.from_row) {
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
      T* to = part.to + r * part.to_row + v * width;
      (Vec<T>::loadu(to) + sum).store(to);
    }
  }
}

template <typename T>
using Accumulate = void (*)(const Part<T>&);

template <typename T>
Accumulate<T> find_accumulate(int64_t rows, int64_t vectors) {
  return with_sizes<kMostRows, kMostVectors>(rows, vectors, [](auto r, auto v) -> Accumulate<T> {
    if constexpr (r * v <= kHeld) {
      return accumulate<T, r, v>;
    } else {
      return nullptr;
    }
  });
}

// A part of a patch that is summed at once: some of its rows, some vectors of each.
template <typename T>
struct Segment {
  int64_t row;
  int64_t start;  // within the run
  Accumulate<T> accumulate;
};

template <typename T>
std::vector<Segment<T>> make_segments(const ConvReluPoolShape& shape) {
  const int64_t vectors = (shape.run() + kWidth<T> - 1) / kWidth<T>;
  const int64_t tiles = (vectors + kMostVectors - 1) / kMostVectors;
  const int64_t held_rows = kHeld / ((vectors + tiles - 1) / tiles);
  const int64_t most_rows = std::min<int64_t>({kMostRows, shape.kernel_height, held_rows});
  std::vector<Segment<T>> segments;
  for (int64_t row = 0; row < shape.kernel_height; row += most_rows) {
    const int64_t rows = std::min(most_rows, shape.kernel_height - row);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = t * vectors / tiles;
      const int64_t to = (t + 1) * vectors / tiles;
      segments.push_back({row, from * kWidth<T>, find_accumulate<T>(rows, to - from)});
    }
  }
  return segments;
}

// A run filled up to whole vectors.
template <typename T>
int64_t padded_run(const ConvReluPoolShape& shape) {
  return (shape.run() + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
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

template <typename T>
T sum(const T* values, int64_t count) {
  Vec<T> sums(T(0));
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    sums = sums + Vec<T>::loadu(values + i, std::min<int64_t>(kWidth<T>, count - i));
  }
  return horizontal_sum(sums);
}

// Lists of up to kChannels channels.
template <typename T>
class ChannelLists {
 public:
  explicit ChannelLists(const ConvReluPoolShape& shape)
      : lists_(kChannels, kMostOutputs), stride_(shape.out_channels) {
    std::copy_n(shape.quad_offsets().begin(), shape.quads(), moves_.begin());
  }

  // Of `count` outputs, up to kMostOutputs, whose patches begin at `places` if the first position won.
  void make(const T* gradients, const uint8_t* winners, int64_t channels, const int32_t* places, int64_t count) {
    lists_.clear();
    if (channels == kChannels) {
      list_outputs<T, kChannels>(lists_.data(), gradients, winners, stride_, places, moves_, count);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      list_outputs<T, 1>(lists_.data() + c, gradients + c, winners + c, stride_, places, moves_, count);
    }
  }

  const List<T>& operator[](int64_t channel) const {
    return lists_.data()[channel];
  }

 private:
  Lists<T> lists_;
  const int64_t stride_;
  // Indexed by winner; what is dead, or no winner at all, goes nowhere.
  Moves moves_{};
};

// How many outputs are listed together: whole images if those are small, else a part of one.
template <typename T>
int64_t listed_outputs(const ConvReluPoolShape& shape) {
  const int64_t cached = kCachedBytes / static_cast<int64_t>(sizeof(T)) / shape.image_size();
  const int64_t positions = shape.positions();
  return positions > kMostOutputs ? kMostOutputs
                                  : positions * std::clamp<int64_t>(cached, 1, kMostOutputs / positions);
}

template <typename T>
class SparseGradWeight final : public ConvReluPoolGradWeight<T> {
 public:
  explicit SparseGradWeight(const ConvReluPoolWeightProblem<T>& problem)
      : problem_(problem),
        run_(padded_run<T>(problem.shape)),
        most_(listed_outputs<T>(problem.shape)),
        segments_(make_segments<T>(problem.shape)) {
    const ConvReluPoolShape& shape = problem.shape;
    // Whole vectors read beyond a run, and so beyond the last image: the sums of those lanes are not used, but there
    // must be memory.
    if (run_ != shape.run()) {
      const T* from = problem.input + (problem.images - 1) * shape.image_size();
      copy_of_last_.assign(from, from + shape.image_size());
      copy_of_last_.resize(shape.image_size() + kWidth<T>);
    }
  }

  int64_t units() const override {
    return (problem_.shape.out_channels + kChannels - 1) / kChannels;
  }

  void run(int64_t begin, int64_t end) override {
    ChannelLists<T> lists(problem_.shape);
    AlignedBuffer<T> sums(kChannels * problem_.shape.kernel_height * run_);
    for (int64_t unit = begin; unit < end; ++unit) {
      sum_channels(unit * kChannels, lists, sums.data());
    }
  }

 private:
  // Up to kChannels channels of the gradients.
  void sum_channels(int64_t channel, ChannelLists<T>& lists, T* sums) {
    const ConvReluPoolShape& shape = problem_.shape;
    const int64_t channels = std::min<int64_t>(kChannels, shape.out_channels - channel);
    const int64_t patch = shape.kernel_height * run_;
    const int64_t total = problem_.images * shape.positions();
    const int64_t before_last = total - shape.positions();
    std::fill_n(sums, kChannels * patch, T(0));
    T bias_sums[kChannels] = {};
    OutputCursor cursor(shape);
    for (int64_t first = 0, last; first < total; first = last) {
      const bool in_last = first >= before_last;
      last = std::min(first + most_, in_last ? total : before_last);
      const int64_t base = cursor.image_offset();
      int32_t places[kMostOutputs];
      for (int64_t o = first; o < last; ++o, cursor.advance()) {
        places[o - first] = static_cast<int32_t>(cursor.offset() - base);
      }
      const int64_t at = first * shape.out_channels + channel;
      lists.make(problem_.grad_output + at, problem_.index + at, channels, places, last - first);
      const T* source = in_last && !copy_of_last_.empty() ? copy_of_last_.data() : problem_.input + base;
      for (const auto& segment : segments_) {
        for (int64_t c = 0; c < channels; ++c) {
          segment.accumulate(
              {.list = lists[c],
               .from = source + segment.row * shape.row_size() + segment.start,
               .from_row = shape.row_size(),
               .to = sums + c * patch + segment.row * run_ + segment.start,
               .to_row = run_});
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        bias_sums[c] += sum(lists[c].coefficients, lists[c].size);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      unpack(shape, sums + c * patch, problem_.grad_weight + (channel + c) * shape.taps());
    }
    std::copy_n(bias_sums, channels, problem_.grad_bias + channel);
  }

  const ConvReluPoolWeightProblem<T> problem_;
  const int64_t run_;
  const int64_t most_;
  const std::vector<Segment<T>> segments_;
  std::vector<T> copy_of_last_;
};

}  // namespace

template <typename T>
std::unique_ptr<ConvReluPoolGradWeight<T>> make_grad_weight(const ConvReluPoolWeightProblem<T>& problem) {
  if (is_thin<T>(problem.shape)) {
    return make_thin_grad_weight(problem);
  }
  return std::make_unique<SparseGradWeight<T>>(problem);
}

template std::unique_ptr<ConvReluPoolGradWeight<float>> make_grad_weight(const ConvReluPoolWeightProblem<float>&);
template std::unique_ptr<ConvReluPoolGradWeight<double>> make_grad_weight(const ConvReluPoolWeightProblem<double>&);

}  // namespace lightkit::cpu
