// The gradient of the weight, summed over the live outputs.
//
// A live output adds its gradient times a patch of the input to the weights of its channel. With the channels last, a
// row of a patch is one run of memory. So the gradient of a channel is a sum over a list of coefficients and patch
// offsets, and stays in registers.

#include "grad_weight_few_channels.h"
#include "kernels.h"
#include "live_lists.h"
#include "tuning.h"

#include <vector>

namespace lightkit::cpu::layer_chain {
namespace {

// Operands of a sum over the same segment of many patches.
template <typename T>
struct SegmentSum {
  const LiveList<T>& list;
  const T* from;  // the segment of the first patch, [rows, vectors, width], rows `from_row` apart
  int64_t from_row;
  T* to;  // [rows, vectors, width], rows `to_row` apart
  int64_t to_row;
};

// to[r][v] += sum over the list of coefficient * from[offset + r * from_row + v], in whole vectors.
template <typename T, int rows, int vectors>
void accumulate(const SegmentSum<T>& part) {
  constexpr int width = kWidth<T>;
  // A multiply-add takes four cycles and two start in each cycle. With fewer than 8 sums, the terms alternate between
  // two sets of sums. More sets do not pay, because the lists are short.
  constexpr int sets = rows * vectors >= 8 ? 1 : 2;
  const LiveList<T> list = part.list;
  Vec<T> sums[sets][rows][vectors];
  LIGHTKIT_UNROLL
  for (int s = 0; s < sets; ++s) {
    LIGHTKIT_UNROLL
    for (int r = 0; r < rows; ++r) {
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sums[s][r][v] = Vec<T>(T(0));
      }
    }
  }
  int64_t i = 0;
  for (; i + sets <= list.size; i += sets) {
    LIGHTKIT_UNROLL
    for (int s = 0; s < sets; ++s) {
      const Vec<T> coefficient(list.coefficients[i + s]);
      const T* from = part.from + list.offsets[i + s];
      LIGHTKIT_UNROLL
      for (int r = 0; r < rows; ++r, from += part.from_row) {
        LIGHTKIT_UNROLL
        for (int v = 0; v < vectors; ++v) {
          sums[s][r][v] = at::vec::fmadd(coefficient, Vec<T>::loadu(from + v * width), sums[s][r][v]);
        }
      }
    }
  }
  for (; i < list.size; ++i) {
    const Vec<T> coefficient(list.coefficients[i]);
    const T* from = part.from + list.offsets[i];
    LIGHTKIT_UNROLL
    for (int r = 0; r < rows; ++r, from += part.from_row) {
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sums[0][r][v] = at::vec::fmadd(coefficient, Vec<T>::loadu(from + v * width), sums[0][r][v]);
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      Vec<T> sum = sums[0][r][v];
      LIGHTKIT_UNROLL
      for (int s = 1; s < sets; ++s) {
        sum = sum + sums[s][r][v];
      }
      T* to = part.to + r * part.to_row + v * width;
      (Vec<T>::loadu(to) + sum).store(to);
    }
  }
}

template <typename T>
using Accumulate = void (*)(const SegmentSum<T>&);

template <typename T>
Accumulate<T> find_accumulate(int64_t rows, int64_t vectors) {
  return with_sizes<kMaxSegmentRows, kMaxSegmentVectors>(rows, vectors, [](auto r, auto v) -> Accumulate<T> {
    if constexpr (r * v <= kHeldVectors) {
      return accumulate<T, r, v>;
    } else {
      return nullptr;
    }
  });
}

// Some rows of a patch, and some vectors of each, that one pass sums.
template <typename T>
struct Segment {
  int64_t row;
  int64_t start;  // offset in the run
  Accumulate<T> accumulate;
};

template <typename T>
std::vector<Segment<T>> make_segments(const Shape& shape) {
  const int64_t vectors = ceil_div(shape.run(), kWidth<T>);
  const int64_t tiles = ceil_div(vectors, kMaxSegmentVectors);
  const int64_t held_rows = kHeldVectors / ceil_div(vectors, tiles);
  const int64_t max_rows = std::min<int64_t>({kMaxSegmentRows, shape.kernel_height, held_rows});
  std::vector<Segment<T>> segments;
  for (int64_t row = 0; row < shape.kernel_height; row += max_rows) {
    const int64_t rows = std::min(max_rows, shape.kernel_height - row);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = t * vectors / tiles;
      const int64_t to = (t + 1) * vectors / tiles;
      segments.push_back({row, from * kWidth<T>, find_accumulate<T>(rows, to - from)});
    }
  }
  return segments;
}

// The length of a run, filled up to whole vectors.
template <typename T>
int64_t padded_run(const Shape& shape) {
  return round_up(shape.run(), kWidth<T>);
}

// Writes the gradient of one output channel's weights.
template <typename T>
void unpack(
    const Shape& shape,
    const T* packed,   // [kernel_height, padded run]
    T* grad_weight) {  // [in_channels, kernel_height, kernel_width]
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
    sums = sums + vectorized<T>(load_lanes<Lanes<T>>(values + i, std::min<int64_t>(kWidth<T>, count - i)));
  }
  return horizontal_sum(sums);
}

// The lists of up to kListChannels output channels.
template <typename T>
class ChannelLists {
 public:
  explicit ChannelLists(const Shape& shape) : lists_(kListChannels, kMaxListOutputs), stride_(shape.out_channels) {
    std::copy_n(shape.window_offsets().begin(), shape.window(), window_offsets_.begin());
  }

  // Lists `count` outputs, at most kMaxListOutputs.
  void make(
      const T* gradients,     // [count, channels], outputs `out_channels` apart
      const uint8_t* argmax,  // as `gradients`
      int64_t channels,
      const int32_t* places,  // [count]: offsets of the patches of the windows' first positions
      int64_t count) {
    lists_.clear();
    if (channels == kListChannels) {
      list_outputs<T, kListChannels>(lists_.data(), gradients, argmax, stride_, places, window_offsets_, count);
      return;
    }
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
      list_outputs<T, 4>(lists_.data() + c, gradients + c, argmax + c, stride_, places, window_offsets_, count);
    }
    for (; c < channels; ++c) {
      list_outputs<T, 1>(lists_.data() + c, gradients + c, argmax + c, stride_, places, window_offsets_, count);
    }
  }

  const LiveList<T>& operator[](int64_t channel) const {
    return lists_.data()[channel];
  }

 private:
  LiveLists<T> lists_;
  const int64_t stride_;
  WindowOffsets window_offsets_{};
};

// The outputs that are listed together: those of whole images if images are small, else a part of one image's.
template <typename T>
int64_t listed_outputs(const Shape& shape) {
  const int64_t cached = kCachedInputBytes / static_cast<int64_t>(sizeof(T)) / shape.image_size();
  const int64_t positions = shape.positions();
  return positions > kMaxListOutputs ? kMaxListOutputs
                                     : positions * std::clamp<int64_t>(cached, 1, kMaxListOutputs / positions);
}

// Sums lists of live outputs. A work item is kListChannels output channels of one of `image_parts` parts of the images.
template <typename T>
class SparseGradWeight final : public GradWeightKernel<T> {
 public:
  explicit SparseGradWeight(const GradWeightProblem<T>& problem)
      : problem_(problem),
        run_(padded_run<T>(problem.shape)),
        max_outputs_(listed_outputs<T>(problem.shape)),
        segments_(make_segments<T>(problem.shape)),
        groups_(ceil_div(problem.shape.out_channels, kListChannels)),
        parts_(image_parts(problem.shape, groups_, problem.images)),
        sums_(parts_ == 1 ? 0 : parts_ * groups_ * group_size()) {
    const Shape& shape = problem.shape;
    // Whole vectors read beyond a run, and so beyond the last image. The sums of those lanes are not used, except that
    // the memory must exist.
    if (run_ != shape.run()) {
      const T* from = problem.input + (problem.images - 1) * shape.image_size();
      copy_of_last_.assign(from, from + shape.image_size());
      copy_of_last_.resize(shape.image_size() + kWidth<T>);
    }
  }

  int64_t work_items() const override {
    return groups_ * parts_;
  }

  void run(int64_t begin, int64_t end) override {
    ChannelLists<T> lists(problem_.shape);
    AlignedBuffer<T> own(parts_ == 1 ? group_size() : 0);
    for (int64_t item = begin; item < end; ++item) {
      T* const sums = parts_ == 1 ? own.data() : sums_.data() + item * group_size();
      sum_channels(item / groups_, item % groups_ * kListChannels, lists, sums);
      if (parts_ == 1) {
        write(item * kListChannels, sums);
      }
    }
  }

  // An item is kListChannels output channels.
  int64_t finish_items() const override {
    return parts_ == 1 ? 0 : groups_;
  }

  // Adds up the parts in their order.
  void finish(int64_t begin, int64_t end) override {
    for (int64_t group = begin; group < end; ++group) {
      T* const sums = sums_.data() + group * group_size();
      for (int64_t part = 1; part < parts_; ++part) {
        const T* const other = sums + part * groups_ * group_size();
        for (int64_t i = 0; i < group_size(); ++i) {
          sums[i] += other[i];
        }
      }
      write(group * kListChannels, sums);
    }
  }

 private:
  int64_t patch() const {
    return problem_.shape.kernel_height * run_;
  }
  // Sums of one group of channels: [kListChannels, kernel_height, padded run], and then those of the biases.
  int64_t group_size() const {
    return kListChannels * (patch() + 1);
  }

  // Writes the gradients of up to kListChannels output channels.
  void write(int64_t channel, const T* sums) {
    const Shape& shape = problem_.shape;
    const int64_t channels = std::min<int64_t>(kListChannels, shape.out_channels - channel);
    for (int64_t c = 0; c < channels; ++c) {
      unpack(shape, sums + c * patch(), problem_.grad_weight + (channel + c) * shape.taps());
    }
    std::copy_n(sums + kListChannels * patch(), channels, problem_.grad_bias + channel);
  }

  // Computes the sums of up to kListChannels output channels over one part of the images.
  void sum_channels(int64_t part, int64_t channel, ChannelLists<T>& lists, T* sums) {
    const Shape& shape = problem_.shape;
    const int64_t channels = std::min<int64_t>(kListChannels, shape.out_channels - channel);
    const int64_t begin = part * problem_.images / parts_;
    const int64_t images = (part + 1) * problem_.images / parts_ - begin;
    const bool has_last = begin + images == problem_.images;
    const int64_t total = images * shape.positions();
    const int64_t before_last = has_last ? total - shape.positions() : total;
    const T* const input = problem_.input + begin * shape.image_size();
    const int64_t first_output = begin * shape.output_size();
    std::fill_n(sums, group_size(), T(0));
    T* const bias_sums = sums + kListChannels * patch();
    OutputCursor cursor(shape);
    for (int64_t first = 0, last; first < total; first = last) {
      const bool in_last = first >= before_last;
      last = std::min(first + max_outputs_, in_last ? total : before_last);
      const int64_t base = cursor.image_offset();
      int32_t places[kMaxListOutputs];
      for (int64_t o = first; o < last; ++o, cursor.advance()) {
        places[o - first] = static_cast<int32_t>(cursor.offset() - base);
      }
      const int64_t at = first_output + first * shape.out_channels + channel;
      lists.make(problem_.grad_output + at, problem_.argmax + at, channels, places, last - first);
      const T* source = in_last && !copy_of_last_.empty() ? copy_of_last_.data() : input + base;
      for (const auto& segment : segments_) {
        for (int64_t c = 0; c < channels; ++c) {
          segment.accumulate(
              {.list = lists[c],
               .from = source + segment.row * shape.row_size() + segment.start,
               .from_row = shape.row_size(),
               .to = sums + c * patch() + segment.row * run_ + segment.start,
               .to_row = run_});
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        bias_sums[c] += sum(lists[c].coefficients, lists[c].size);
      }
    }
  }

  const GradWeightProblem<T> problem_;
  const int64_t run_;
  const int64_t max_outputs_;
  const std::vector<Segment<T>> segments_;
  const int64_t groups_;
  const int64_t parts_;
  AlignedBuffer<T> sums_;  // [parts, groups, group_size], if there are several parts
  std::vector<T> copy_of_last_;
};

}  // namespace

template <typename T>
std::unique_ptr<GradWeightKernel<T>> make_grad_weight(const GradWeightProblem<T>& problem) {
  if (has_few_channels<T>(problem.shape)) {
    return make_few_channels_grad_weight(problem);
  }
  return std::make_unique<SparseGradWeight<T>>(problem);
}

template std::unique_ptr<GradWeightKernel<float>> make_grad_weight(const GradWeightProblem<float>&);
template std::unique_ptr<GradWeightKernel<double>> make_grad_weight(const GradWeightProblem<double>&);

}  // namespace lightkit::cpu::layer_chain
