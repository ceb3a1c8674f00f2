// The 3x3 correlation of step 1 by Winograd's F(2, 3) over its rows. Along a row, each input is multiplied with the
// weights of three taps, so that a register tile reads few inputs even with one vector of output channels.

#include "row_winograd.h"

#include "../common/aligned_buffer.h"
#include "../common/pieces.h"
#include "result_pieces.h"
#include "row_tile.h"

namespace lightkit::cpu::conv2d {
namespace {

using row_winograd::kPoints;

template <typename T>
class RowWinogradCorrelation {
 public:
  explicit RowWinogradCorrelation(const CorrelationProblem<T>& problem)
      : p_(problem),
        c_(problem.correlation),
        grid_(problem.correlation),
        planes_(c_, kRowBandBytes, 2),
        band_(planes_),
        blocks_(ceil_div(c_.out_channels, kWidth<T>), kMaxRowVectors),
        columns_(round_up(c_.columns, kMaxPositions)),
        packed_(blocks_.vectors * kWidth<T> * kPoints * c_.in_channels * 3),
        bias_(blocks_.vectors * kWidth<T>) {
    for (int64_t v = 0; v < planes_.vectors(); ++v) {
      runs_.push_back({v * band_.vector(), std::min(planes_.pixel(), c_.in_channels - v * planes_.pixel())});
    }
  }

  void run() {
    pack();
    correlate_in_pieces(
        p_,
        c_.images * planes_.bands(),
        c_.macs(),
        [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t begin, int64_t end, Moments* moments) {
          for (int64_t item = begin; item < end; ++item) {
            run_band(planes_.band(item), scratch, moments);
          }
        });
  }

 private:
  struct Scratch {
    explicit Scratch(const RowWinogradCorrelation& r)
        : planes(r.planes_.size()),
          band(r.band_.size()),
          products(r.planes_.band_rows() / 2 * kPoints * r.columns_ * kMaxRowVectors * kWidth<T>) {
      std::fill_n(band.data(), r.band_.size(), T(0));
    }
    AlignedBuffer<T> planes;
    AlignedBuffer<T> band;
    AlignedBuffer<T> products;  // [pairs, kPoints, columns, vectors of a block, width]
  };

  // The packed weights are [blocks, kPoints, in_channels, 3, vectors, width]. Lanes without a channel are 0.
  void pack() {
    constexpr int width = kWidth<T>;
    const int64_t all = c_.in_channels * blocks_.vectors;
    in_pieces(all, 16, kPackingMacs * c_.out_channels * c_.in_channels * 9, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t vector = item / c_.in_channels;
        const int64_t in = item % c_.in_channels;
        int64_t block = 0;
        while (blocks_.begin(block + 1) <= vector) {
          ++block;
        }
        const int64_t lanes = blocks_.size(block) * width;
        const int64_t point = c_.in_channels * 3 * lanes;
        const int64_t filled = std::min<int64_t>(width, c_.out_channels - vector * width);
        T* const to = packed_.data() + blocks_.begin(block) * width * kPoints * c_.in_channels * 3 + in * 3 * lanes +
            (vector - blocks_.begin(block)) * width;
        for (int64_t lane = 0; lane < width; ++lane) {
          const auto weight = [&](int tap) {
            return lane < filled ? p_.weights.at(vector * width + lane, in, grid_.tap(tap)) : T(0);
          };
          for (int t = 0; t < 3; ++t) {
            const T g0 = weight(t), g1 = weight(3 + t), g2 = weight(6 + t);
            T* const place = to + t * lanes + lane;
            place[0] = g0;
            place[point] = (g0 + g2 + g1) * T(0.5);
            place[2 * point] = (g0 + g2 - g1) * T(0.5);
            place[3 * point] = g2;
          }
          if (in == 0) {
            bias_.data()[vector * width + lane] =
                p_.bias != nullptr && lane < filled ? p_.bias[vector * width + lane] : T(0);
          }
        }
      }
    });
  }

  void run_band(const Band& band, Scratch& scratch, Moments* moments) const {
    const int64_t pairs = ceil_div(band.rows, 2);
    planes_.fill(p_.source, band, scratch.planes.data());
    band_.fill(scratch.planes.data(), pairs, scratch.band.data());
    for (int64_t b = 0; b < blocks_.blocks; ++b) {
      with_constant<kMaxRowVectors>(blocks_.size(b), [&](auto vectors) {
        if (planes_.pixel() == 1) {
          multiply<vectors, 1>(b, pairs, scratch);
        } else if (planes_.pixel() == 3) {
          multiply<vectors, 3>(b, pairs, scratch);
        } else {
          multiply<vectors, kWidth<T>>(b, pairs, scratch);
        }
        write<vectors>(b, band, scratch, moments);
      });
    }
    if (moments != nullptr) {
      moments->add_count(static_cast<double>(band.rows * c_.columns));
    }
  }

  template <int vectors, int step>
  void multiply(int64_t block, int64_t pairs, Scratch& scratch) const {
    constexpr int lanes = vectors * kWidth<T>;
    alignas(64) static constexpr T zeros[lanes] = {};
    const int64_t values = c_.in_channels * 3;
    const T* const weight = packed_.data() + blocks_.begin(block) * kWidth<T> * kPoints * values;
    for (int point = 0; point < kPoints; ++point) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t x = 0; x < c_.columns; x += kPositions<vectors>) {
          multiply_row_tile<T, vectors, step>(
              scratch.band.data() + point * band_.point() + pair * band_.row() + x * step,
              runs_.data(),
              runs_.data() + runs_.size(),
              weight + point * values * lanes,
              zeros,
              0,
              scratch.products.data() + ((pair * kPoints + point) * columns_ + x) * lanes,
              lanes);
        }
      }
    }
  }

  template <int vectors>
  void write(int64_t block, const Band& band, const Scratch& scratch, Moments* moments) const {
    for (int v = 0; v < vectors; ++v) {
      const int64_t channel = blocks_.begin(block) * kWidth<T> + v * kWidth<T>;
      const int64_t filled = std::min<int64_t>(kWidth<T>, c_.out_channels - channel);
      ShiftedSums<T> sums{Vec<T>(T(0))};
      for (int64_t r = 0; r < band.rows; r += 2) {
        const T* const products = scratch.products.data() + (r / 2 * kPoints * columns_ * vectors + v) * kWidth<T>;
        T* const upper = p_.results.at(band.image, band.row + r, 0) + channel;
        const bool has_lower = r + 1 < band.rows;
        if (moments != nullptr && r == 0) {
          sums.shift = pair_of<vectors>(products + c_.columns / 2 * vectors * kWidth<T>, channel)[0];
        }
        // Calls without the statistics, or of a whole vector, are other instances of the loop.
        const auto write_pair = [&](auto is_whole, auto has_moments) {
          write_rows<vectors, is_whole, has_moments>(products, channel, filled, upper, has_lower, sums);
        };
        if (moments != nullptr) {
          filled == kWidth<T> ? write_pair(std::true_type(), std::true_type())
                              : write_pair(std::false_type(), std::true_type());
        } else {
          filled == kWidth<T> ? write_pair(std::true_type(), std::false_type())
                              : write_pair(std::false_type(), std::false_type());
        }
      }
      if (moments != nullptr) {
        sums.add_to(*moments, channel, filled, moments->count(), static_cast<double>(band.rows * c_.columns));
      }
    }
  }

  // Returns the two results of a column.
  template <int vectors>
  std::array<Vec<T>, 2> pair_of(const T* products, int64_t channel) const {
    const int64_t point = columns_ * vectors * kWidth<T>;
    const Vec<T> bias = Vec<T>::loadu(bias_.data() + channel);
    const Vec<T> m1 = Vec<T>::loadu(products + point);
    const Vec<T> m2 = Vec<T>::loadu(products + 2 * point);
    return {Vec<T>::loadu(products) + m1 + m2 + bias, m1 - m2 - Vec<T>::loadu(products + 3 * point) + bias};
  }

  template <int vectors, bool is_whole, bool has_moments>
  void write_rows(
      const T* products, int64_t channel, int64_t filled, T* upper, bool has_lower, ShiftedSums<T>& sums) const {
    const int64_t step = p_.results.column;
    T* lower = upper + (has_lower ? p_.results.row : 0);
    ShiftedSums<T> own = sums;
    const int64_t point = columns_ * vectors * kWidth<T>;
    const Vec<T> bias = Vec<T>::loadu(bias_.data() + channel);
    for (const T* const end = products + c_.columns * vectors * kWidth<T>; products != end;
         products += vectors * kWidth<T>, upper += step, lower += step) {
      const Vec<T> m1 = Vec<T>::loadu(products + point);
      const Vec<T> m2 = Vec<T>::loadu(products + 2 * point);
      const Vec<T> first = Vec<T>::loadu(products) + m1 + m2 + bias;
      const Vec<T> second = m1 - m2 - Vec<T>::loadu(products + 3 * point) + bias;
      // Without a lower row, the upper one overwrites it.
      if constexpr (is_whole) {
        second.store(lower);
        first.store(upper);
      } else {
        second.store(lower, static_cast<int>(filled));
        first.store(upper, static_cast<int>(filled));
      }
      if constexpr (has_moments) {
        own.add(first);
        if (has_lower) {
          own.add(second);
        }
      }
    }
    sums = own;
  }

  const CorrelationProblem<T>& p_;
  const Correlation& c_;
  const TileGrid grid_;
  const Planes<T> planes_;
  const row_winograd::TransformedBand<T> band_;
  const VectorBlocks blocks_;
  const int64_t columns_;
  AlignedBuffer<T> packed_;
  AlignedBuffer<T> bias_;
  std::vector<Run> runs_;
};

}  // namespace

template <typename T>
void correlate_by_row_winograd(const CorrelationProblem<T>& problem) {
  RowWinogradCorrelation<T>(problem).run();
}

template void correlate_by_row_winograd(const CorrelationProblem<float>&);
template void correlate_by_row_winograd(const CorrelationProblem<double>&);

}  // namespace lightkit::cpu::conv2d
