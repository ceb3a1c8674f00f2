// The mean and the variance of each channel.

#include "../common/aligned_buffer.h"
#include "groups.h"
#include "passes.h"

namespace lightkit::cpu::norm_act {
namespace {

// Adds rows to `mean` and `squares`, the mean and the sum of squared differences of `count` rows before.
struct Moments {
  double count;
  double* mean;     // [channels]
  double* squares;  // [channels]

  // Adds `other_count` rows whose moments other(c, mean, squares) gives for each channel.
  template <typename F>
  void add(int64_t channels, double other_count, const F& other) {
    const double total = count + other_count;
    const double share = other_count / total;
    const double weight = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      double other_mean, other_squares;
      other(c, other_mean, other_squares);
      const double difference = other_mean - mean[c];
      mean[c] += difference * share;
      squares[c] += other_squares + difference * difference * weight;
    }
    count = total;
  }
};

// Computes the sums over some rows of x - pivot and of its square.
template <typename T>
void add_rows(
    int64_t channels,
    const T* input,  // [rows, channels]
    int64_t begin,
    int64_t end,
    const T* pivot,  // [channels]
    BlockSums<T>& sums) {
  sums.clear();
  for (int64_t row = begin, next; row < end; row = next) {
    next = std::min(end, row + chain_rows<T>(channels));
    for_each_group<T>(channels, [&](auto group) {
      using G = decltype(group);
      typename G::Array center;
      group.load(pivot, center);
      Sums<G> chains;
      Sums<G>::for_each_row(row, next, [&](int64_t at, int turn) {
        LIGHTKIT_UNROLL
        for (int v = 0; v < G::vectors; ++v) {
          const auto difference = group.load(input + at * channels, v) - center[v];
          chains.add(turn, v, difference, difference * difference);
        }
      });
      sums.add(group, chains);
    });
  }
}

template <typename T>
void part_moments(const Shape& shape, const T* input, const Parts& parts, int64_t part, Moments& moments) {
  const int64_t channels = shape.channels;
  AlignedBuffer<T> pivots(channels);
  T* const pivot = pivots.data();
  BlockSums<T> sums(channels);
  const T* const sum = sums.first();
  const T* const squares = sums.second();
  std::fill_n(pivot, channels, T(0));
  bool first = true;
  parts.for_each_block(part, [&](int64_t begin, int64_t end) {
    if (first) {
      const int64_t count = std::min(end - begin, kPivotRows);
      add_rows(channels, input, begin, begin + count, pivot, sums);
      for (int64_t c = 0; c < channels; ++c) {
        pivot[c] = sum[c] / static_cast<T>(count);
      }
      first = false;
    }
    add_rows(channels, input, begin, end, pivot, sums);
    const auto count = static_cast<double>(end - begin);
    const double inverse = 1 / count;
    moments.add(channels, count, [&](int64_t c, double& mean, double& squared) {
      const double total = sum[c];
      mean = pivot[c] + total * inverse;
      squared = std::max(squares[c] - total * total * inverse, 0.0);
      pivot[c] = static_cast<T>(mean);
    });
  });
}

}  // namespace

template <typename T>
void statistics(const Shape& shape, const T* input, double* mean, double* variance) {
  const int64_t channels = shape.channels;
  const Parts parts(shape.rows());
  // [parts, 2, channels].
  AlignedBuffer<double> sums(parts.count() * 2 * channels);
  std::fill_n(sums.data(), parts.count() * 2 * channels, 0.0);
  AlignedBuffer<double> counts(parts.count());
  parts.for_each(channels, [&](int64_t part) {
    double* const own = sums.data() + part * 2 * channels;
    Moments moments{0, own, own + channels};
    part_moments(shape, input, parts, part, moments);
    counts.data()[part] = moments.count;
  });
  std::fill_n(mean, channels, 0.0);
  std::fill_n(variance, channels, 0.0);
  Moments total{0, mean, variance};
  for (int64_t part = 0; part < parts.count(); ++part) {
    const double* const own = sums.data() + part * 2 * channels;
    total.add(channels, counts.data()[part], [&](int64_t c, double& part_mean, double& part_squares) {
      part_mean = own[c];
      part_squares = own[channels + c];
    });
  }
  for (int64_t c = 0; c < channels; ++c) {
    variance[c] /= total.count;
  }
}

template void statistics(const Shape&, const float*, double*, double*);
template void statistics(const Shape&, const double*, double*, double*);

}  // namespace lightkit::cpu::norm_act
