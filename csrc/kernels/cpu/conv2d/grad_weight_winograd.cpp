// The gradient of a 3x3 weight by Winograd's algorithm: the products of transformed inputs and transformed gradients
// are summed over the tiles, and transformed once for each part.

#include "../common/winograd.h"

#include "kernels.h"
#include "partial_sums.h"
#include "tile_cursor.h"

namespace lightkit::cpu::conv2d {
namespace {

// sums[i][v] += the sum over the tiles of inputs[tile][i] * gradients[tile][v].
template <typename T, int taps, int vectors>
static void sum_tiles(
    int64_t tiles,
    const T* inputs,     // [tiles, width]
    const T* gradients,  // [tiles, vectors, width], tiles `lanes` apart
    T* sums,             // [taps, vectors, width], taps `lanes` apart
    int64_t lanes) {
  constexpr int width = kWidth<T>;
  // Nested loops over sums of one vector each would leave the sums in memory.
  Vec<T> sum[taps * vectors];
  LIGHTKIT_UNROLL
  for (int i = 0; i < taps * vectors; ++i) {
    sum[i] = Vec<T>::loadu(sums + i / vectors * lanes + i % vectors * width);
  }
  for (int64_t t = 0; t < tiles; ++t, inputs += width, gradients += lanes) {
    Vec<T> g[vectors];
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      g[v] = Vec<T>::loadu(gradients + v * width);
    }
    LIGHTKIT_UNROLL
    for (int i = 0; i < taps * vectors; ++i) {
      sum[i] = at::vec::fmadd(Vec<T>(inputs[i / vectors]), g[i % vectors], sum[i]);
    }
  }
  LIGHTKIT_UNROLL
  for (int i = 0; i < taps * vectors; ++i) {
    sum[i].store(sums + i / vectors * lanes + i % vectors * width);
  }
}

template <typename T>
class WinogradGradWeight {
 public:
  explicit WinogradGradWeight(const GradWeightProblem<T>& problem)
      : p_(problem),
        c_(problem.correlation),
        grid_(problem.correlation),
        sums_(problem, 9 * c_.in_channels, ceil_div(grid_.tiles(), kTiles)),
        lanes_(sums_.lanes()),
        blocks_(lanes_ / kWidth<T>, kMaxVectors),
        input_stride_(kTiles * c_.in_channels + kPointGap<T>),
        gradient_stride_(kTiles * lanes_ + kPointGap<T>),
        zeros_(std::max(c_.in_channels, lanes_)) {
    std::fill_n(zeros_.data(), std::max(c_.in_channels, lanes_), T(0));
  }

  void run() {
    sums_.run(
        c_.macs(),
        [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t begin, int64_t end, T* sums, T* bias) {
          run_part(begin, end, scratch, sums, bias);
        },
        c_.in_channels * p_.kernel_size,
        [&](int64_t k) { return grid_.place(k, c_.in_channels, p_.kernel_size); });
  }

 private:
  struct Scratch {
    explicit Scratch(const WinogradGradWeight& w)
        : inputs(winograd::kPoints * w.input_stride_),
          gradients(winograd::kPoints * w.gradient_stride_),
          products(winograd::kPoints * w.c_.in_channels * w.lanes_) {}
    AlignedBuffer<T> inputs;     // [kPoints, vectors of in_channels, kTiles, width], points `input_stride_` apart
    AlignedBuffer<T> gradients;  // [kPoints, kTiles, lanes], points `gradient_stride_` apart
    AlignedBuffer<T> products;   // [kPoints, in_channels, lanes]
  };

  void run_part(int64_t begin, int64_t end, Scratch& scratch, T* sums, T* bias) {
    const int64_t points = c_.in_channels * lanes_;
    std::fill_n(scratch.products.data(), winograd::kPoints * points, T(0));
    TileCursor tile(grid_, begin * kTiles);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tiles = std::min<int64_t>(kTiles, grid_.tiles() - item * kTiles);
      for (int64_t t = 0; t < tiles; ++t, tile.advance()) {
        transform(tile, t, scratch);
      }
      multiply(tiles, scratch);
      if (p_.grad_bias != nullptr) {
        const T* const gradients = scratch.gradients.data() + winograd::kSumPoint * gradient_stride_;
        for (int64_t c = 0; c < lanes_; c += kWidth<T>) {
          Vec<T> sum(T(0));
          for (int64_t t = 0; t < tiles; ++t) {
            sum = sum + Vec<T>::loadu(gradients + t * lanes_ + c);
          }
          (Vec<T>::loadu(bias + c) + sum).store(bias + c);
        }
      }
    }
    for (int64_t at = 0; at < points; at += kWidth<T>) {
      winograd::transform_grad_weight<T>(scratch.products.data() + at, points, sums + at, points);
    }
  }

  void transform(const TileCursor& tile, int64_t t, Scratch& scratch) const {
    constexpr int width = kWidth<T>;
    const T* x[4][4];
    grid_.place_inputs(p_.input, tile, zeros_.data(), x);
    for (int64_t c = 0; c < c_.in_channels; c += width) {
      winograd::transform_input<T>(
          [&](int r, int column) { return Vec<T>::loadu(x[r][column] + c); },
          scratch.inputs.data() + c * kTiles + t * width,
          input_stride_);
    }
    const T* g[2][2];
    grid_.place_results(p_.grad_output, tile, zeros_.data(), g);
    T* const to = scratch.gradients.data() + t * lanes_;
    int64_t c = 0;
    for (; c + width <= c_.out_channels; c += width) {
      winograd::transform_gradient<T>(
          [&](int r, int column) { return Vec<T>::loadu(g[r][column] + c); }, to + c, gradient_stride_);
    }
    if (c < c_.out_channels) {
      const int64_t count = c_.out_channels - c;
      winograd::transform_gradient<T>(
          [&](int r, int column) { return Vec<T>::loadu(g[r][column] + c, count); }, to + c, gradient_stride_);
    }
  }

  void multiply(int64_t tiles, Scratch& scratch) const {
    constexpr int width = kWidth<T>;
    for (int point = 0; point < winograd::kPoints; ++point) {
      const T* const inputs = scratch.inputs.data() + point * input_stride_;
      const T* const gradients = scratch.gradients.data() + point * gradient_stride_;
      T* const products = scratch.products.data() + point * c_.in_channels * lanes_;
      for (int64_t b = 0; b < blocks_.blocks; ++b) {
        const int64_t channel = blocks_.begin(b) * width;
        with_constant<kMaxVectors>(blocks_.size(b), [&](auto vectors) {
          constexpr int taps = std::min(kTaps<vectors>, width);
          for (int64_t c = 0; c < c_.in_channels; c += taps) {
            sum_tiles<T, taps, vectors>(
                tiles,
                inputs + c / width * width * kTiles + c % width,
                gradients + channel,
                products + c * lanes_ + channel,
                lanes_);
          }
        });
      }
    }
  }

  const GradWeightProblem<T>& p_;
  const Correlation& c_;
  const TileGrid grid_;
  PartialSums<T> sums_;
  const int64_t lanes_;
  const VectorBlocks blocks_;
  const int64_t input_stride_;
  const int64_t gradient_stride_;
  AlignedBuffer<T> zeros_;  // values that do not exist
};

}  // namespace

template <typename T>
void grad_weight_by_winograd(const GradWeightProblem<T>& problem) {
  WinogradGradWeight<T>(problem).run();
}

template void grad_weight_by_winograd(const GradWeightProblem<float>&);
template void grad_weight_by_winograd(const GradWeightProblem<double>&);

}  // namespace lightkit::cpu::conv2d
