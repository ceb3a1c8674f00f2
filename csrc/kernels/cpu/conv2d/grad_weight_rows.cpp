// The gradient of a 3x3 weight by Winograd's F(2, 3) over its rows. Along a row, each input is multiplied with the
// gradients of three taps, so that a register tile reads few inputs even with one vector of output channels.

#include "kernels.h"
#include "partial_sums.h"
#include "row_winograd.h"

namespace lightkit::cpu::conv2d {
namespace {

using row_winograd::kPoints;

// The operands of a tile's sum over pairs of rows.
template <typename T>
struct RowSums {
  const T* inputs;  // of the first column, [pairs, columns + 2, pixel]
  int64_t input_row;
  int64_t pixel;
  const T* gradients;  // [pairs, columns + 4, lanes], of which the first and last two columns are 0
  int64_t gradient_row;
  int64_t lanes;
  int64_t pairs;
  int64_t columns;
};

// sums[i][t] += the sum over pairs and columns x of inputs[x + t][i] * gradients[x], for the taps t = 0, 1, 2.
template <typename T, int channels, int vectors>
static void sum_rows(const RowSums<T>& rows, T* sums) {  // [channels, 3, vectors, width], vectors `lanes` apart
  constexpr int width = kWidth<T>;
  constexpr int count = channels * 3 * vectors;
  const int64_t lanes = rows.lanes;
  const int64_t pixel = rows.pixel;
  // Nested loops over sums of one vector each would leave the sums in memory.
  Vec<T> sum[count];
  LIGHTKIT_UNROLL
  for (int i = 0; i < count; ++i) {
    sum[i] = Vec<T>::loadu(sums + i / vectors * lanes + i % vectors * width);
  }
  for (int64_t pair = 0; pair < rows.pairs; ++pair) {
    const T* x = rows.inputs + pair * rows.input_row;
    const T* g = rows.gradients + pair * rows.gradient_row;
    for (const T* const end = g + (rows.columns + 2) * lanes; g != end; g += lanes, x += pixel) {
      // Input column c meets the gradient of result c - t, which lies at c - t + 2.
      Vec<T> gradient[3 * vectors];
      LIGHTKIT_UNROLL
      for (int i = 0; i < 3 * vectors; ++i) {
        gradient[i] = Vec<T>::loadu(g + (2 - i / vectors) * lanes + i % vectors * width);
      }
      LIGHTKIT_UNROLL
      for (int i = 0; i < count; ++i) {
        sum[i] = at::vec::fmadd(Vec<T>(x[i / (3 * vectors)]), gradient[i % (3 * vectors)], sum[i]);
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int i = 0; i < count; ++i) {
    sum[i].store(sums + i / vectors * lanes + i % vectors * width);
  }
}

template <typename T>
class RowGradWeight {
 public:
  explicit RowGradWeight(const GradWeightProblem<T>& problem)
      : p_(problem),
        c_(problem.correlation),
        grid_(problem.correlation),
        planes_(c_, kRowBandBytes, 2),
        band_(planes_),
        sums_(problem, 9 * c_.in_channels, c_.images * planes_.bands()),
        lanes_(sums_.lanes()),
        blocks_(lanes_ / kWidth<T>, kMaxRowVectors),
        gradient_row_((c_.columns + 4) * lanes_),
        gradient_point_(planes_.band_rows() / 2 * gradient_row_) {}

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
    explicit Scratch(const RowGradWeight& r)
        : planes(r.planes_.size()),
          band(r.band_.size()),
          gradients(kPoints * r.gradient_point_),
          products(kPoints * r.c_.in_channels * 3 * r.lanes_) {
      std::fill_n(gradients.data(), kPoints * r.gradient_point_, T(0));
    }
    AlignedBuffer<T> planes;
    AlignedBuffer<T> band;
    AlignedBuffer<T> gradients;  // [kPoints, pairs, 2 + columns + 2, lanes]
    AlignedBuffer<T> products;   // [kPoints, in_channels, 3, lanes]
  };

  void run_part(int64_t begin, int64_t end, Scratch& scratch, T* sums, T* bias) {
    std::fill_n(scratch.products.data(), kPoints * c_.in_channels * 3 * lanes_, T(0));
    for (int64_t item = begin; item < end; ++item) {
      const Band band = planes_.band(item);
      const int64_t pairs = ceil_div(band.rows, 2);
      planes_.fill(p_.input, band, scratch.planes.data());
      band_.fill(scratch.planes.data(), pairs, scratch.band.data());
      transform_gradients(band, scratch.gradients.data());
      if (p_.grad_bias != nullptr) {
        add_bias(scratch.gradients.data() + gradient_point_, pairs, bias);
      }
      for (int64_t b = 0; b < blocks_.blocks; ++b) {
        with_constant<kMaxRowVectors>(blocks_.size(b), [&](auto vectors) { multiply<vectors>(b, pairs, scratch); });
      }
    }
    write_part(scratch.products.data(), sums);
  }

  // Writes A g of pairs of rows: {g0, g0 + g1, g0 - g1, g1}, the last one without its sign.
  void transform_gradients(const Band& band, T* to) const {
    const int64_t step = p_.grad_output.column;
    const int64_t lanes = lanes_;
    const int64_t point = gradient_point_;
    for (int64_t r = 0; r < band.rows; r += 2) {
      const bool has_lower = r + 1 < band.rows;
      for (int64_t c = 0; c < c_.out_channels; c += kWidth<T>) {
        const int64_t count = std::min<int64_t>(kWidth<T>, c_.out_channels - c);
        const T* upper = p_.grad_output.at(band.image, band.row + r, 0) + c;
        const T* lower = upper + (has_lower ? p_.grad_output.row : 0);
        T* place = to + r / 2 * gradient_row_ + 2 * lanes + c;
        for (const T* const end = place + c_.columns * lanes; place != end;
             place += lanes, upper += step, lower += step) {
          const Vec<T> g0 = count == kWidth<T> ? Vec<T>::loadu(upper) : Vec<T>::loadu(upper, count);
          Vec<T> g1(T(0));
          if (has_lower) {
            g1 = count == kWidth<T> ? Vec<T>::loadu(lower) : Vec<T>::loadu(lower, count);
          }
          g0.store(place);
          (g0 + g1).store(place + point);
          (g0 - g1).store(place + 2 * point);
          g1.store(place + 3 * point);
        }
      }
    }
  }

  // The second point of a gradient is the sum of its two rows.
  void add_bias(const T* gradients, int64_t pairs, T* bias) const {
    for (int64_t c = 0; c < lanes_; c += kWidth<T>) {
      Vec<T> sum(T(0));
      for (int64_t at = 0; at < pairs * (c_.columns + 4); ++at) {
        sum = sum + Vec<T>::loadu(gradients + at * lanes_ + c);
      }
      (Vec<T>::loadu(bias + c) + sum).store(bias + c);
    }
  }

  template <int vectors>
  void multiply(int64_t block, int64_t pairs, Scratch& scratch) const {
    // Sums, gradients and an input fit the registers.
    constexpr int most = kRowChannels / vectors;
    const int64_t channel = blocks_.begin(block) * kWidth<T>;
    for (int point = 0; point < kPoints; ++point) {
      RowSums<T> rows{
          .inputs = nullptr,
          .input_row = band_.row(),
          .pixel = planes_.pixel(),
          .gradients = scratch.gradients.data() + point * gradient_point_ + channel,
          .gradient_row = gradient_row_,
          .lanes = lanes_,
          .pairs = pairs,
          .columns = c_.columns};
      T* sums = scratch.products.data() + point * c_.in_channels * 3 * lanes_ + channel;
      for (int64_t c = 0; c < c_.in_channels;) {
        const int64_t vector = c / planes_.pixel();
        rows.inputs = scratch.band.data() + point * band_.point() + vector * band_.vector() + c % planes_.pixel();
        const int64_t left = std::min(c_.in_channels, (vector + 1) * planes_.pixel()) - c;
        const auto sum = [&](auto channels) {
          sum_rows<T, channels, vectors>(rows, sums);
          c += channels;
          sums += channels * 3 * lanes_;
        };
        if (left >= most) {
          sum(std::integral_constant<int, most>());
        } else if (left >= 3) {
          sum(std::integral_constant<int, std::min(3, most)>());
        } else {
          sum(std::integral_constant<int, 1>());
        }
      }
    }
  }

  // Applies G^T to the products of each channel and column tap, and writes [3, 3, in_channels, lanes].
  void write_part(const T* products, T* sums) const {
    const Vec<T> half(T(0.5));
    const int64_t point = c_.in_channels * 3 * lanes_;
    const int64_t tap = c_.in_channels * lanes_;
    for (int64_t c = 0; c < c_.in_channels; ++c) {
      for (int64_t column = 0; column < 3; ++column) {
        for (int64_t lane = 0; lane < lanes_; lane += kWidth<T>) {
          const T* from = products + (c * 3 + column) * lanes_ + lane;
          const Vec<T> m1 = Vec<T>::loadu(from + point);
          const Vec<T> m2 = Vec<T>::loadu(from + 2 * point);
          const Vec<T> sum = (m1 + m2) * half;
          T* const to = sums + column * tap + c * lanes_ + lane;
          (Vec<T>::loadu(from) + sum).store(to);
          ((m1 - m2) * half).store(to + 3 * tap);
          (sum - Vec<T>::loadu(from + 3 * point)).store(to + 6 * tap);
        }
      }
    }
  }

  const GradWeightProblem<T>& p_;
  const Correlation& c_;
  const TileGrid grid_;
  const Planes<T> planes_;
  const row_winograd::TransformedBand<T> band_;
  PartialSums<T> sums_;
  const int64_t lanes_;
  const VectorBlocks blocks_;
  const int64_t gradient_row_;
  const int64_t gradient_point_;
};

}  // namespace

template <typename T>
void grad_weight_by_rows(const GradWeightProblem<T>& problem) {
  RowGradWeight<T>(problem).run();
}

template void grad_weight_by_rows(const GradWeightProblem<float>&);
template void grad_weight_by_rows(const GradWeightProblem<double>&);

}  // namespace lightkit::cpu::conv2d
