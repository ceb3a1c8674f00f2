// The direct algorithm: it rearranges a band of the source into planes, and multiplies register tiles of it.

#include "../common/aligned_buffer.h"
#include "kernels.h"
#include "planes.h"
#include "result_pieces.h"
#include "row_tile.h"

namespace lightkit::cpu::conv2d {
namespace {

// Some runs, whose weights fit a part of the first-level cache.
struct Panel {
  size_t begin;
  size_t end;
  int64_t first_value;
};

std::vector<Panel> make_panels(const std::vector<Run>& runs, int64_t values_of_input, int64_t value_bytes) {
  std::vector<Panel> panels{{0, 0, 0}};
  int64_t bytes = 0;
  int64_t value = 0;
  for (size_t r = 0; r < runs.size(); ++r) {
    const int64_t values = runs[r].length * values_of_input;
    if (bytes > 0 && bytes + values * value_bytes > kPanelBytes) {
      panels.push_back({r, r, value});
      bytes = 0;
    }
    panels.back().end = r + 1;
    bytes += values * value_bytes;
    value += values;
  }
  return panels;
}

template <typename T>
class DirectCorrelation {
 public:
  explicit DirectCorrelation(const CorrelationProblem<T>& problem)
      : p_(problem),
        c_(problem.correlation),
        blocks_(ceil_div(c_.out_channels, kWidth<T>), kMaxVectors),
        shares_taps_(c_.in_channels > 1 && blocks_.vectors <= kMaxRowVectors && Planes<T>::can_share_taps(c_)),
        planes_(c_, kBandBytes, 1, shares_taps_),
        values_(static_cast<int64_t>(planes_.values().size())),
        packed_(blocks_.vectors * kWidth<T> * values_),
        bias_(blocks_.vectors * kWidth<T>) {}

  void run() {
    pack();
    correlate_in_pieces(
        p_,
        c_.images * planes_.bands(),
        c_.macs(),
        [&] { return AlignedBuffer<T>(planes_.size()); },
        [&](AlignedBuffer<T>& scratch, int64_t begin, int64_t end, Moments* moments) {
          for (int64_t item = begin; item < end; ++item) {
            const Band band = planes_.band(item);
            run_band(band, scratch.data());
            if (moments != nullptr) {
              add_results(*moments, p_.results, band, c_.columns, c_.out_channels);
            }
          }
        });
  }

 private:
  // The packed weights are [blocks, values, vectors, width]. Lanes without a channel are 0.
  void pack() {
    constexpr int width = kWidth<T>;
    in_pieces(blocks_.vectors, 1, kPackingMacs * c_.out_channels * values_, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        int64_t block = 0;
        while (blocks_.begin(block + 1) <= v) {
          ++block;
        }
        const int64_t lanes = blocks_.size(block) * width;
        T* to = packed_.data() + blocks_.begin(block) * width * values_ + (v - blocks_.begin(block)) * width;
        const int64_t filled = std::min<int64_t>(width, c_.out_channels - v * width);
        for (const auto& value : planes_.values()) {
          for (int64_t lane = 0; lane < filled; ++lane) {
            to[lane] = p_.weights.at(v * width + lane, value.channel, value.tap->index);
          }
          std::fill(to + filled, to + width, T(0));
          to += lanes;
        }
        for (int64_t lane = 0; lane < width; ++lane) {
          bias_.data()[v * width + lane] = p_.bias != nullptr && lane < filled ? p_.bias[v * width + lane] : T(0);
        }
      }
    });
  }

  void run_band(const Band& band, T* scratch) const {
    planes_.fill(p_.source, band, scratch);
    for (int64_t b = 0; b < blocks_.blocks; ++b) {
      with_constant<kMaxVectors>(blocks_.size(b), [&](auto vectors) {
        if (planes_.pixel() == 1) {
          run_block<vectors, 1>(b, band, scratch);
        } else if (planes_.pixel() == 3) {
          run_block<vectors, 3>(b, band, scratch);
        } else {
          run_block<vectors, kWidth<T>>(b, band, scratch);
        }
      });
    }
  }

  template <int vectors, int step>
  void run_block(int64_t block, const Band& band, const T* scratch) const {
    constexpr int width = kWidth<T>;
    constexpr int positions = kPositions<vectors>;
    const int64_t channel = blocks_.begin(block) * width;
    const T* const weight = packed_.data() + channel * values_;
    const Run* const runs = planes_.runs().data();
    const int64_t value_bytes = vectors * width * static_cast<int64_t>(sizeof(T));
    for (const Panel& panel : make_panels(planes_.runs(), shares_taps_ ? 3 : 1, value_bytes)) {
      for (int64_t r = 0; r < band.rows; ++r) {
        for (int64_t x = 0; x < c_.columns; x += positions) {
          const TileResults<T> results{
              .data = p_.results.at(band.image, band.row + r, x) + channel,
              .stride = p_.results.column,
              .count = std::min<int64_t>(positions, c_.columns - x),
              .channels = std::min<int64_t>(vectors * width, c_.out_channels - channel)};
          with_whole_tile<T, vectors>(
              results,
              bias_.data() + channel,
              panel.begin == 0,
              [&](const T* initial, int64_t initial_stride, T* sums, int64_t stride) {
                const T* const inputs = scratch + r * planes_.row_size() + x * step;
                const Run* const begin = runs + panel.begin;
                const Run* const end = runs + panel.end;
                const T* const panel_weight = weight + panel.first_value * vectors * width;
                if constexpr (vectors <= kMaxRowVectors) {
                  if (shares_taps_) {
                    multiply_row_tile<T, vectors, step>(
                        inputs, begin, end, panel_weight, initial, initial_stride, sums, stride);
                    return;
                  }
                }
                multiply_tile<T, vectors, step>(
                    inputs, begin, end, panel_weight, initial, initial_stride, sums, stride);
              });
        }
      }
    }
  }

  const CorrelationProblem<T>& p_;
  const Correlation& c_;
  const VectorBlocks blocks_;
  const bool shares_taps_;
  const Planes<T> planes_;
  const int64_t values_;
  AlignedBuffer<T> packed_;
  AlignedBuffer<T> bias_;
};

}  // namespace

template <typename T>
void correlate_directly(const CorrelationProblem<T>& problem) {
  DirectCorrelation<T>(problem).run();
}

template void correlate_directly(const CorrelationProblem<float>&);
template void correlate_directly(const CorrelationProblem<double>&);

}  // namespace lightkit::cpu::conv2d
