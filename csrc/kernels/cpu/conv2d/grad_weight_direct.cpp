// The gradient of the weight by the direct algorithm: register tiles of the gradient sum over the positions of a band.

#include "kernels.h"
#include "partial_sums.h"
#include "planes.h"

namespace lightkit::cpu::conv2d {
namespace {

// The operands of a tile's sum over a band.
template <typename T>
struct BandSum {
  const T* input;  // of the first position
  int64_t pixel;   // from a position to the next one
  int64_t row;     // from a row to the next one
  const T* grad_output;
  int64_t grad_pixel;
  int64_t grad_row;
  int64_t rows;
  int64_t columns;
  int64_t channels;  // of grad_output, at most `vectors` vectors
};

// to[k][v] += the sum over the positions of input[position + offset(k)] * grad_output[position][v].
template <typename T, int taps, int vectors, typename Offset>
static void sum_band(const BandSum<T>& band, const Offset& offset, int64_t count, T* to, int64_t lanes) {
  constexpr int width = kWidth<T>;
  // A loop over one vector within a loop over taps would leave the sums in memory, and so would one loop over all sums
  // where the offsets are listed.
  std::conditional_t<vectors == 1, Vec<T>[taps], Vec<T>[taps][vectors]> sum;
  LIGHTKIT_UNROLL
  for (int k = 0; k < taps; ++k) {
    if constexpr (vectors == 1) {
      sum[k] = Vec<T>(T(0));
    } else {
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sum[k][v] = Vec<T>(T(0));
      }
    }
  }
  const auto add_row = [&](auto is_whole, const T* x, const T* g) {
    for (int64_t column = 0; column < band.columns; ++column, x += band.pixel, g += band.grad_pixel) {
      Vec<T> gradient[vectors];
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        if constexpr (is_whole) {
          gradient[v] = Vec<T>::loadu(g + v * width);
        } else {
          gradient[v] = Vec<T>::loadu(g + v * width, std::min<int64_t>(width, band.channels - v * width));
        }
      }
      LIGHTKIT_UNROLL
      for (int k = 0; k < taps; ++k) {
        const Vec<T> value(x[offset(k)]);
        if constexpr (vectors == 1) {
          sum[k] = at::vec::fmadd(value, gradient[0], sum[k]);
        } else {
          LIGHTKIT_UNROLL
          for (int v = 0; v < vectors; ++v) {
            sum[k][v] = at::vec::fmadd(value, gradient[v], sum[k][v]);
          }
        }
      }
    }
  };
  for (int64_t r = 0; r < band.rows; ++r) {
    const T* const x = band.input + r * band.row;
    const T* const g = band.grad_output + r * band.grad_row;
    if (band.channels == vectors * width) {
      add_row(std::true_type(), x, g);
    } else {
      add_row(std::false_type(), x, g);
    }
  }
  const auto add_to = [](T* place, const Vec<T>& value) { (Vec<T>::loadu(place) + value).store(place); };
  LIGHTKIT_UNROLL
  for (int k = 0; k < taps; ++k) {
    if (k < count) {
      if constexpr (vectors == 1) {
        add_to(to + k * lanes, sum[k]);
      } else {
        LIGHTKIT_UNROLL
        for (int v = 0; v < vectors; ++v) {
          add_to(to + k * lanes + v * width, sum[k][v]);
        }
      }
    }
  }
}

template <typename T>
class DirectGradWeight {
 public:
  explicit DirectGradWeight(const GradWeightProblem<T>& problem)
      : p_(problem),
        c_(problem.correlation),
        planes_(c_, kGradBandBytes),
        values_(static_cast<int64_t>(planes_.values().size())),
        sums_(problem, values_, c_.images * planes_.bands()),
        lanes_(sums_.lanes()) {
    for (const Run& run : planes_.runs()) {
      for (int64_t i = 0; i < run.length; ++i) {
        offsets_.push_back(run.offset + i);
      }
    }
  }

  void run() {
    const int64_t taps = p_.kernel_size;
    sums_.run(
        c_.macs(),
        [&] { return AlignedBuffer<T>(planes_.size()); },
        [&](AlignedBuffer<T>& scratch, int64_t begin, int64_t end, T* sums, T* bias) {
          for (int64_t item = begin; item < end; ++item) {
            const Band band = planes_.band(item);
            if (p_.grad_weight != nullptr) {
              planes_.fill(p_.input, band, scratch.data());
              add_band(band, scratch.data(), sums);
            }
            if (p_.grad_bias != nullptr) {
              add_bias(band, bias);
            }
          }
        },
        c_.in_channels * taps,
        [&](int64_t k) {
          const auto& value = planes_.values()[k];
          return value.channel * taps + value.tap->index;
        });
  }

 private:
  void add_band(const Band& of, const T* scratch, T* sums) const {
    BandSum<T> band{
        .input = nullptr,
        .pixel = planes_.pixel(),
        .row = planes_.row_size(),
        .grad_output = nullptr,
        .grad_pixel = p_.grad_output.column,
        .grad_row = p_.grad_output.row,
        .rows = of.rows,
        .columns = c_.columns,
        .channels = 0};
    // Runs of whole vectors go through contiguous tiles, the others through listed ones.
    const auto over_blocks = [&](int64_t most, auto&& f) {
      const VectorBlocks blocks(lanes_ / kWidth<T>, most);
      for (int64_t b = 0; b < blocks.blocks; ++b) {
        const int64_t channel = blocks.begin(b) * kWidth<T>;
        band.grad_output = p_.grad_output.at(of.image, of.row, 0) + channel;
        band.channels = std::min(blocks.size(b) * kWidth<T>, c_.out_channels - channel);
        f(blocks.size(b), channel);
      }
    };
    int64_t whole = 0;
    for (const Run& run : planes_.runs()) {
      if (run.length != kWidth<T>) {
        break;
      }
      whole += run.length;
    }
    if (whole > 0) {
      over_blocks(kMaxVectors, [&](int64_t size, int64_t channel) {
        with_constant<kMaxVectors>(size, [&](auto vectors) {
          constexpr int taps = std::min(kTaps<vectors>, kWidth<T>);
          for (int64_t k = 0; k < whole; k += taps) {
            band.input = scratch + offsets_[k];
            sum_band<T, taps, vectors>(band, [](int tap) { return tap; }, taps, sums + k * lanes_ + channel, lanes_);
          }
        });
      });
    }
    if (whole < values_) {
      over_blocks(kMaxListedVectors, [&](int64_t size, int64_t channel) {
        with_constant<kMaxListedVectors>(size, [&](auto vectors) {
          for (int64_t k = whole; k < values_; k += kListedTaps) {
            // The offsets that fill the last tile repeat its first one; their sums are not stored.
            const int64_t count = std::min<int64_t>(kListedTaps, values_ - k);
            int64_t offsets[kListedTaps];
            for (int64_t i = 0; i < kListedTaps; ++i) {
              offsets[i] = offsets_[i < count ? k + i : k];
            }
            band.input = scratch;
            sum_band<T, kListedTaps, vectors>(
                band, [&](int tap) { return offsets[tap]; }, count, sums + k * lanes_ + channel, lanes_);
          }
        });
      });
    }
  }

  void add_bias(const Band& band, T* sums) const {
    for (int64_t c = 0; c < c_.out_channels; c += kWidth<T>) {
      const int64_t channels = std::min<int64_t>(kWidth<T>, c_.out_channels - c);
      Vec<T> even(T(0));
      Vec<T> odd(T(0));
      for (int64_t r = 0; r < band.rows; ++r) {
        const T* from = p_.grad_output.at(band.image, band.row + r, 0) + c;
        int64_t x = 0;
        for (; x + 2 <= c_.columns; x += 2, from += 2 * p_.grad_output.column) {
          even = even + Vec<T>::loadu(from, channels);
          odd = odd + Vec<T>::loadu(from + p_.grad_output.column, channels);
        }
        if (x < c_.columns) {
          even = even + Vec<T>::loadu(from, channels);
        }
      }
      (Vec<T>::loadu(sums + c) + (even + odd)).store(sums + c);
    }
  }

  const GradWeightProblem<T>& p_;
  const Correlation& c_;
  const Planes<T> planes_;
  const int64_t values_;
  PartialSums<T> sums_;
  const int64_t lanes_;
  std::vector<int64_t> offsets_;
};

}  // namespace

template <typename T>
void grad_weight_directly(const GradWeightProblem<T>& problem) {
  DirectGradWeight<T>(problem).run();
}

template void grad_weight_directly(const GradWeightProblem<float>&);
template void grad_weight_directly(const GradWeightProblem<double>&);

}  // namespace lightkit::cpu::conv2d
