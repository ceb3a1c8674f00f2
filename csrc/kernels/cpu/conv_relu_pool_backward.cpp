// The gradients, as sums over the live outputs alone.
//
// A live output adds its gradient times a patch of the input to the gradient of the weight, and its gradient times
// the weight of its channel to a patch of the gradient of the input. With the channels last a row of a patch is one
// run of memory. So both are the same work: sum over a list of (coefficient, where a patch begins), the sums kept in
// registers.

#include "conv_relu_pool_backward.h"
#include "conv_relu_pool_lists.h"

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

}  // namespace

template <typename T>
struct Segment {
  int64_t row;
  int64_t start;  // within the run
  int64_t last;   // lanes of the last vector
  Accumulate<T> accumulate;
};

namespace {

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
class SparseGradWeight final : public ConvReluPoolGradWeight<T> {
 public:
  explicit SparseGradWeight(const ConvReluPoolWeightProblem<T>& problem)
      : problem_(problem),
        run_(padded_run<T>(problem.shape)),
        most_(outputs_of_a_list(problem.shape)),
        segments_(make_segments<T>(problem.shape, kSums)) {
    const ConvReluPoolShape& shape = problem.shape;
    std::copy_n(shape.quad_offsets().begin(), shape.quads(), moves_.begin());
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
    Lists<T> lists(kChannels, most_);
    AlignedBuffer<T> sums(kChannels * problem_.shape.kernel_height * run_);
    for (int64_t unit = begin; unit < end; ++unit) {
      sum_channels(unit * kChannels, lists, sums.data());
    }
  }

 private:
  // Whole images if they are small, else a part of one.
  static int64_t outputs_of_a_list(const ConvReluPoolShape& shape) {
    const int64_t cached = kCachedBytes / static_cast<int64_t>(sizeof(T)) / shape.image_size();
    const int64_t positions = shape.positions();
    return positions > kMostOutputs ? kMostOutputs
                                    : positions * std::clamp<int64_t>(cached, 1, kMostOutputs / positions);
  }

  // Up to kChannels channels of the gradients.
  void sum_channels(int64_t channel, Lists<T>& lists, T* sums) {
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
      lists.clear();
      const auto list = [&](auto together, int64_t c) {
        list_outputs<T, together>(
            lists.data() + c,
            problem_.grad_output + first * shape.out_channels + channel + c,
            problem_.index + first * shape.out_channels + channel + c,
            shape.out_channels,
            places,
            moves_,
            last - first);
      };
      if (channels == kChannels) {
        list(std::integral_constant<int, kChannels>{}, 0);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          list(std::integral_constant<int, 1>{}, c);
        }
      }
      const T* source = in_last && !copy_of_last_.empty() ? copy_of_last_.data() : problem_.input + base;
      for (const auto& segment : segments_) {
        for (int64_t c = 0; c < channels; ++c) {
          segment.accumulate(
              lists.data()[c],
              source + segment.row * shape.row_size() + segment.start,
              shape.row_size(),
              sums + c * patch + segment.row * run_ + segment.start,
              run_,
              kWidth<T>);
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const List<T>& live = lists.data()[c];
        bias_sums[c] += std::accumulate(live.coefficients, live.coefficients + live.size, T(0));
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
  // Indexed by winner; what is dead, or no winner at all, goes nowhere.
  Moves moves_{};
  std::vector<T> copy_of_last_;
};

}  // namespace

template <typename T>
ConvReluPoolGradInput<T>::ConvReluPoolGradInput(const ConvReluPoolShape& shape, const T* weight)
    : shape_(shape),
      weight_(weight),
      packed_(shape.out_channels * shape.kernel_height * padded_run<T>(shape)),
      // Of a segment, the weights of the listed channels stay in the first-level cache while all outputs are worked off.
      segments_(make_segments<T>(
          shape,
          kCachedBytes / static_cast<int64_t>(sizeof(T)) / kWidth<T> / std::min(kListed, shape.out_channels))) {}

template <typename T>
ConvReluPoolGradInput<T>::~ConvReluPoolGradInput() = default;

template <typename T>
ConvReluPoolGradInput<T>::ConvReluPoolGradInput(ConvReluPoolGradInput&&) noexcept = default;

// A unit is an output channel. The packed weight lies as (out_channels, kernel_height, padded run).
template <typename T>
void ConvReluPoolGradInput<T>::prepare(int64_t begin, int64_t end) {
  const int64_t run = padded_run<T>(shape_);
  T* to = packed_.data() + begin * shape_.kernel_height * run;
  for (int64_t out = begin; out < end; ++out) {
    const T* from = weight_ + out * shape_.taps();
    for (int64_t row = 0; row < shape_.kernel_height; ++row) {
      for (int64_t column = 0; column < shape_.kernel_width; ++column, ++from) {
        for (int64_t in = 0; in < shape_.in_channels; ++in) {
          *to++ = from[in * shape_.kernel_size()];
        }
      }
      to = std::fill_n(to, run - shape_.run(), T(0));
    }
  }
}

template <typename T>
void ConvReluPoolGradInput<T>::run(
    int64_t images, const T* grad_output, const uint8_t* index, T* grad_input) const {
  const int64_t listed = std::min(kListed, shape_.out_channels);
  const auto quad_offsets = shape_.quad_offsets();
  const int64_t run = padded_run<T>(shape_);
  const int64_t patch = shape_.kernel_height * run;
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
              patch);
        }
        for (const auto& segment : segments_) {
          for (int64_t l = 0; l < count * quads; ++l) {
            segment.accumulate(
                lists.data()[l],
                packed_.data() + channel * patch + segment.row * run + segment.start,
                run,
                grad_input + offsets[l / quads] + quad_offsets[l % quads] + segment.row * shape_.row_size() +
                    segment.start,
                shape_.row_size(),
                segment.last);
          }
        }
      }
    }
  }
}

template <typename T>
std::unique_ptr<ConvReluPoolGradWeight<T>> make_grad_weight(const ConvReluPoolWeightProblem<T>& problem) {
  if (is_thin<T>(problem.shape)) {
    return make_thin_grad_weight(problem);
  }
  return std::make_unique<SparseGradWeight<T>>(problem);
}

template class ConvReluPoolGradInput<float>;
template class ConvReluPoolGradInput<double>;
template std::unique_ptr<ConvReluPoolGradWeight<float>> make_grad_weight(const ConvReluPoolWeightProblem<float>&);
template std::unique_ptr<ConvReluPoolGradWeight<double>> make_grad_weight(const ConvReluPoolWeightProblem<double>&);

}  // namespace lightkit::cpu
