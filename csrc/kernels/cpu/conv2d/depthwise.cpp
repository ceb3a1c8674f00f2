// The depthwise convolution: each channel has one filter, so that channels are lanes, and there is no matrix product.

#include "../common/aligned_buffer.h"
#include "kernels.h"
#include "partial_sums.h"
#include "planes.h"
#include "result_pieces.h"

namespace lightkit::cpu::conv2d {
namespace {

// Positions of a register tile. Derived: their sums hide the latency of a multiply-add.
constexpr int kDepthwisePositions = 8;

// Taps of a register tile of the gradient of the weight. Derived: 9 sums, a gradient and an input fit 16 registers, and
// a 3x3 kernel has 9.
constexpr int kDepthwiseTaps = 9;

// Writes the filters as [vectors, taps, width]; lanes without a channel are 0.
template <typename T>
void pack_filters(const Correlation& c, const Weights<T>& weights, T* to) {
  constexpr int width = kWidth<T>;
  for (int64_t channel = 0; channel < c.in_channels; channel += width) {
    for (const Tap& tap : c.taps) {
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t own = channel + lane;
        *to++ = own < c.in_channels ? weights.at(own, 0, tap.index) : T(0);
      }
    }
  }
}

// Writes `count` results of one vector of channels.
template <typename T>
void write_positions(
    const T* inputs,  // of the first position
    int64_t pixel,
    const Run* runs,  // a run for each tap
    int64_t taps,
    const T* filter,  // [taps, width]
    const Vec<T>& bias,
    int64_t count,
    int64_t channels,
    T* to,
    int64_t stride) {
  constexpr int width = kWidth<T>;
  Vec<T> sum[kDepthwisePositions];
  LIGHTKIT_UNROLL
  for (int p = 0; p < kDepthwisePositions; ++p) {
    sum[p] = bias;
  }
  for (int64_t t = 0; t < taps; ++t, filter += width) {
    const T* from = inputs + runs[t].offset;
    const Vec<T> weight = Vec<T>::loadu(filter);
    LIGHTKIT_UNROLL
    for (int p = 0; p < kDepthwisePositions; ++p) {
      sum[p] = at::vec::fmadd(Vec<T>::loadu(from + p * pixel), weight, sum[p]);
    }
  }
  LIGHTKIT_UNROLL
  for (int p = 0; p < kDepthwisePositions; ++p) {
    if (p < count) {
      sum[p].store(to + p * stride, static_cast<int>(channels));
    }
  }
}

}  // namespace

template <typename T>
void correlate_depthwise(const CorrelationProblem<T>& problem) {
  constexpr int width = kWidth<T>;
  const Correlation& c = problem.correlation;
  const Planes<T> planes(c, kBandBytes, 1, false, /*pad_pixels=*/true);
  const int64_t taps = static_cast<int64_t>(c.taps.size());
  AlignedBuffer<T> filters(planes.vectors() * taps * width);
  pack_filters(c, problem.weights, filters.data());
  correlate_in_pieces(
      problem,
      c.images * planes.bands(),
      c.macs() / c.in_channels,
      [&] { return AlignedBuffer<T>(planes.size()); },
      [&](AlignedBuffer<T>& scratch, int64_t begin, int64_t end, Moments* moments) {
        for (int64_t item = begin; item < end; ++item) {
          const Band band = planes.band(item);
          planes.fill(problem.source, band, scratch.data());
          for (int64_t v = 0; v < planes.vectors(); ++v) {
            const int64_t channels = std::min<int64_t>(width, c.in_channels - v * width);
            const Vec<T> bias =
                problem.bias == nullptr ? Vec<T>(T(0)) : Vec<T>::loadu(problem.bias + v * width, channels);
            for (int64_t r = 0; r < band.rows; ++r) {
              for (int64_t x = 0; x < c.columns; x += kDepthwisePositions) {
                write_positions<T>(
                    scratch.data() + r * planes.row_size() + x * planes.pixel(),
                    planes.pixel(),
                    planes.runs().data() + v * taps,
                    taps,
                    filters.data() + v * taps * width,
                    bias,
                    c.columns - x,
                    channels,
                    problem.results.at(band.image, band.row + r, x) + v * width,
                    problem.results.column);
              }
            }
          }
          if (moments != nullptr) {
            add_results(*moments, problem.results, band, c.columns, c.out_channels);
          }
        }
      });
}

template <typename T>
void grad_weight_depthwise(const GradWeightProblem<T>& problem) {
  constexpr int width = kWidth<T>;
  const Correlation& c = problem.correlation;
  const Planes<T> planes(c, kGradBandBytes, 1, false, /*pad_pixels=*/true);
  const int64_t taps = static_cast<int64_t>(c.taps.size());
  PartialSums<T> sums(problem, taps, c.images * planes.bands());
  const int64_t lanes = sums.lanes();
  const auto add_band = [&](const Band& band, T* scratch, T* to, T* bias) {
    planes.fill(problem.input, band, scratch);
    for (int64_t v = 0; v < planes.vectors(); ++v) {
      const int64_t channels = std::min<int64_t>(width, c.in_channels - v * width);
      const auto row = [&](int64_t r) { return problem.grad_output.at(band.image, band.row + r, 0) + v * width; };
      for (int64_t t = 0; t < taps; t += kDepthwiseTaps) {
        // The taps that fill the last block repeat its first one; their sums are not stored.
        const int64_t count = std::min<int64_t>(kDepthwiseTaps, taps - t);
        int64_t offsets[kDepthwiseTaps];
        for (int64_t i = 0; i < kDepthwiseTaps; ++i) {
          offsets[i] = planes.runs()[v * taps + t + (i < count ? i : 0)].offset;
        }
        Vec<T> sum[kDepthwiseTaps];
        LIGHTKIT_UNROLL
        for (int i = 0; i < kDepthwiseTaps; ++i) {
          sum[i] = Vec<T>(T(0));
        }
        for (int64_t r = 0; r < band.rows; ++r) {
          const T* g = row(r);
          const T* x = scratch + r * planes.row_size();
          for (int64_t column = 0; column < c.columns; ++column, g += problem.grad_output.column, x += width) {
            const Vec<T> gradient = Vec<T>::loadu(g, channels);
            LIGHTKIT_UNROLL
            for (int i = 0; i < kDepthwiseTaps; ++i) {
              sum[i] = at::vec::fmadd(Vec<T>::loadu(x + offsets[i]), gradient, sum[i]);
            }
          }
        }
        LIGHTKIT_UNROLL
        for (int i = 0; i < kDepthwiseTaps; ++i) {
          if (i < count) {
            T* const place = to + (t + i) * lanes + v * width;
            (Vec<T>::loadu(place) + sum[i]).store(place);
          }
        }
      }
      if (problem.grad_bias != nullptr) {
        T* const place = bias + v * width;
        Vec<T> sum = Vec<T>::loadu(place);
        for (int64_t r = 0; r < band.rows; ++r) {
          const T* g = row(r);
          for (int64_t column = 0; column < c.columns; ++column, g += problem.grad_output.column) {
            sum = sum + Vec<T>::loadu(g, channels);
          }
        }
        sum.store(place);
      }
    }
  };
  sums.run(
      c.macs() / c.in_channels,
      [&] { return AlignedBuffer<T>(planes.size()); },
      [&](AlignedBuffer<T>& scratch, int64_t begin, int64_t end, T* to, T* bias) {
        for (int64_t item = begin; item < end; ++item) {
          add_band(planes.band(item), scratch.data(), to, bias);
        }
      },
      problem.kernel_size,
      [&](int64_t k) { return c.taps[k].index; });
}

template void correlate_depthwise(const CorrelationProblem<float>&);
template void correlate_depthwise(const CorrelationProblem<double>&);
template void grad_weight_depthwise(const GradWeightProblem<float>&);
template void grad_weight_depthwise(const GradWeightProblem<double>&);

}  // namespace lightkit::cpu::conv2d
