// The 3x3 correlation of step 1 by Winograd's algorithm: it transforms tiles of the source, multiplies them point by
// point as matrices, and transforms the products back into 2x2 results.

#include "../common/winograd.h"

#include "../common/aligned_buffer.h"
#include "../common/pieces.h"
#include "result_pieces.h"
#include "tile_cursor.h"

namespace lightkit::cpu::conv2d {
namespace {

template <typename T>
class WinogradCorrelation {
 public:
  explicit WinogradCorrelation(const CorrelationProblem<T>& problem)
      : p_(problem),
        c_(problem.correlation),
        grid_(problem.correlation),
        blocks_(ceil_div(c_.out_channels, kWidth<T>), kMaxVectors),
        input_stride_(kTiles * c_.in_channels + kPointGap<T>),
        packed_(winograd::kPoints * c_.in_channels * blocks_.vectors * kWidth<T>),
        bias_(blocks_.vectors * kWidth<T>),
        zeros_(c_.in_channels) {
    std::fill_n(zeros_.data(), c_.in_channels, T(0));
    for (int64_t vector = 0; vector < c_.in_channels / kWidth<T>; ++vector) {
      runs_.push_back({vector * kTiles * kWidth<T>, kWidth<T>});
    }
  }

  void run() {
    pack();
    const int64_t tiles = grid_.tiles();
    const int64_t items = ceil_div(tiles, kTiles);
    correlate_in_pieces(
        p_,
        items,
        c_.macs(),
        [&] { return Scratch(input_stride_); },
        [&](Scratch& scratch, int64_t begin, int64_t end, Moments* moments) {
          TileCursor cursor(grid_, begin * kTiles);
          for (int64_t item = begin; item < end; ++item) {
            run_block(cursor, std::min<int64_t>(kTiles, tiles - item * kTiles), scratch, moments);
          }
        });
  }

 private:
  // A tile's results in memory, and which of them exist.
  struct Place {
    T* data;
    bool right;
    bool below;
  };

  struct Scratch {
    explicit Scratch(int64_t input_stride)
        : inputs(winograd::kPoints * input_stride),
          products(winograd::kPoints * (kTiles * kMaxVectors * kWidth<T> + kPointGap<T>)) {}
    AlignedBuffer<T> inputs;    // [kPoints, vectors of in_channels, kTiles, width], points `input_stride_` apart
    AlignedBuffer<T> products;  // [kPoints, kTiles, vectors of a block, width], and gaps
    Place places[kTiles];
  };

  // The packed weights are [blocks, kPoints, in_channels, vectors, width]. Lanes without a channel are 0.
  void pack() {
    constexpr int width = kWidth<T>;
    const int64_t all = c_.in_channels * blocks_.vectors;
    in_pieces(all, 16, kPackingMacs * c_.out_channels * c_.in_channels * 9, [&](int64_t begin, int64_t end) {
      alignas(64) T taps[9 * width];
      for (int64_t item = begin; item < end; ++item) {
        const int64_t vector = item / c_.in_channels;
        const int64_t in = item % c_.in_channels;
        int64_t block = 0;
        while (blocks_.begin(block + 1) <= vector) {
          ++block;
        }
        const int64_t filled = std::min<int64_t>(width, c_.out_channels - vector * width);
        std::fill_n(taps, 9 * width, T(0));
        for (int64_t lane = 0; lane < filled; ++lane) {
          for (int t = 0; t < 9; ++t) {
            taps[t * width + lane] = p_.weights.at(vector * width + lane, in, grid_.tap(t));
          }
        }
        const int64_t lanes = blocks_.size(block) * width;
        T* const to = packed_.data() + blocks_.begin(block) * width * winograd::kPoints * c_.in_channels + in * lanes +
            (vector - blocks_.begin(block)) * width;
        winograd::transform_weight<T>(taps, to, c_.in_channels * lanes);
        if (in == 0) {
          for (int64_t lane = 0; lane < width; ++lane) {
            bias_.data()[vector * width + lane] =
                p_.bias != nullptr && lane < filled ? p_.bias[vector * width + lane] : T(0);
          }
        }
      }
    });
  }

  void run_block(TileCursor& cursor, int64_t tiles, Scratch& scratch, Moments* moments) const {
    int64_t positions = 0;
    for (int64_t t = 0; t < tiles; ++t, cursor.advance()) {
      transform_tile(cursor, scratch.inputs.data() + t * kWidth<T>);
      const int64_t y = 2 * cursor.row();
      const int64_t x = 2 * cursor.column();
      const Place place{p_.results.at(cursor.image(), y, x), x + 1 < c_.columns, y + 1 < c_.rows};
      positions += (1 + place.right) * (1 + place.below);
      scratch.places[t] = place;
    }
    // If the block is not full, the tiles from `tiles` on keep old values; their products are not read.
    for (int64_t b = 0; b < blocks_.blocks; ++b) {
      with_constant<kMaxVectors>(blocks_.size(b), [&](auto vectors) {
        multiply<vectors>(b, tiles, scratch);
        write<vectors>(b, tiles, positions, scratch, moments);
      });
    }
    if (moments != nullptr) {
      moments->add_count(static_cast<double>(positions));
    }
  }

  void transform_tile(const TileCursor& cursor, T* to) const {
    const T* at[4][4];
    grid_.place_inputs(p_.source, cursor, zeros_.data(), at);
    const int64_t stride = input_stride_;
    for (int64_t c = 0, channels = c_.in_channels; c < channels; c += kWidth<T>) {
      winograd::transform_input<T>(
          [&](int r, int column) { return Vec<T>::loadu(at[r][column] + c); }, to + c * kTiles, stride);
    }
  }

  template <int vectors>
  void multiply(int64_t block, int64_t tiles, Scratch& scratch) const {
    constexpr int lanes = vectors * kWidth<T>;
    alignas(64) static constexpr T zeros[lanes] = {};
    const T* weight = packed_.data() + blocks_.begin(block) * kWidth<T> * winograd::kPoints * c_.in_channels;
    for (int point = 0; point < winograd::kPoints; ++point, weight += c_.in_channels * lanes) {
      for (int64_t t = 0; t < tiles; t += kPositions<vectors>) {
        multiply_tile<T, vectors, kWidth<T>>(
            scratch.inputs.data() + point * input_stride_ + t * kWidth<T>,
            runs_.data(),
            runs_.data() + runs_.size(),
            weight,
            zeros,
            0,
            scratch.products.data() + point * (kTiles * lanes + kPointGap<T>)+t * lanes,
            lanes);
      }
    }
  }

  template <int vectors>
  void write(int64_t block, int64_t tiles, int64_t positions, const Scratch& scratch, Moments* moments) const {
    constexpr int width = kWidth<T>;
    constexpr int lanes = vectors * width;
    for (int v = 0; v < vectors; ++v) {
      const int64_t channel = blocks_.begin(block) * width + v * width;
      const int64_t filled = std::min<int64_t>(width, c_.out_channels - channel);
      const Vec<T> bias = Vec<T>::loadu(bias_.data() + channel);
      const auto result = [&](int64_t t) {
        return winograd::transform_output<T>(
            scratch.products.data() + t * lanes + v * width, kTiles * lanes + kPointGap<T>, bias);
      };
      ShiftedSums<T> sums{moments == nullptr ? Vec<T>(T(0)) : result(tiles / 2)[0]};
      for (int64_t t = 0; t < tiles; ++t) {
        const auto y = result(t);
        const Place& place = scratch.places[t];
        T* const upper = place.data + channel;
        T* const lower = upper + p_.results.row;
        if (filled == width && place.right && place.below) {
          y[0].store(upper);
          y[1].store(upper + p_.results.column);
          y[2].store(lower);
          y[3].store(lower + p_.results.column);
          if (moments != nullptr) {
            sums.add(y[0], y[1], y[2], y[3]);
          }
        } else {
          const auto store = [&](bool exists, const Vec<T>& value, T* to) {
            if (exists) {
              value.store(to, static_cast<int>(filled));
              sums.add(value);
            }
          };
          store(true, y[0], upper);
          store(place.right, y[1], upper + p_.results.column);
          store(place.below, y[2], lower);
          store(place.right && place.below, y[3], lower + p_.results.column);
        }
      }
      if (moments != nullptr) {
        sums.add_to(*moments, channel, filled, moments->count(), static_cast<double>(positions));
      }
    }
  }

  const CorrelationProblem<T>& p_;
  const Correlation& c_;
  const TileGrid grid_;
  const VectorBlocks blocks_;
  const int64_t input_stride_;
  AlignedBuffer<T> packed_;
  AlignedBuffer<T> bias_;
  AlignedBuffer<T> zeros_;  // [in_channels], the source beyond its edges
  std::vector<Run> runs_;
};

}  // namespace

template <typename T>
void correlate_by_winograd(const CorrelationProblem<T>& problem) {
  WinogradCorrelation<T>(problem).run();
}

template void correlate_by_winograd(const CorrelationProblem<float>&);
template void correlate_by_winograd(const CorrelationProblem<double>&);

}  // namespace lightkit::cpu::conv2d
