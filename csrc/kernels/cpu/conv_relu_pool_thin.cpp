// The gradient of the weight where a position reads few inputs in a row, as with one channel.
//
// Vectors are over the output channels. Of each output the gradient is spread over its positions, 0 but for the one
// that won: with a pool four times the products of conv_relu_pool_grad_weight.cpp, but no list is made, and all lanes
// are used.

#include "conv_relu_pool_thin.h"

#include <type_traits>
#include <vector>

namespace lightkit::cpu {
namespace {

// Of the kernel, what one pass over an image sums: all sums and the four gradients fit 16 registers.
constexpr int kMostRows = 3;
constexpr int kMostTaps = 3;

// Images are summed in this many parts, whatever the number of threads.
constexpr int64_t kParts = 16;

// The gradients of one vector of channels in one image.
template <typename T>
struct Outputs {
  const T* grads;
  const uint8_t* winners;
  int64_t stride;  // from output to output
  int64_t count;   // of channels, up to a vector

  // Of one output: its gradient at each of its positions. Returns it at all of them.
  template <int quads>
  Vec<T> load(int64_t output, Vec<T> (&spread)[quads]) const {
    const T* grad = grads + output * stride;
    const auto gradient = load_lanes<Lanes<T>>(grad, count);
    const auto bytes = load_lanes<LaneBytes<T>>(winners + output * stride, count);
    const auto winner = __builtin_convertvector(bytes, LaneNumbers<T>);
    LIGHTKIT_UNROLL for (int q = 0; q < quads; ++q) {
      spread[q] = vectorized<T>(winner == q ? gradient : Lanes<T>{});
    }
    return vectorized<T>(winner != kDead ? gradient : Lanes<T>{});
  }
};

// Adds to sums[r][t], `row_stride` from row to row and `tap_stride` from tap to tap, what an image has of gradient
// times input, for some rows and taps of the kernel; and to `bias_sum`, unless null, what it has of gradient.
template <typename T, int quads, int rows, int taps>
void add_image(
    const ConvReluPoolShape& shape,
    const Outputs<T>& outputs,
    const T* image,
    T* sums,
    int64_t row_stride,
    int64_t tap_stride,
    T* bias_sum) {
  constexpr int step = quads == 4 ? 2 : 1;
  constexpr int rows_read = rows + step - 1;
  Vec<T> sum[rows][taps];
  LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL for (int t = 0; t < taps; ++t) {
      sum[r][t] = Vec<T>(T(0));
    }
  }
  Vec<T> total(T(0));
  const int64_t channels = shape.in_channels;
  int64_t output = 0;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const T* x[rows_read];
    LIGHTKIT_UNROLL for (int r = 0; r < rows_read; ++r) {
      x[r] = image + (row * step + r) * shape.row_size();
    }
    for (int64_t column = 0; column < shape.columns(); ++column, ++output) {
      Vec<T> spread[quads];
      total = total + outputs.load(output, spread);
      LIGHTKIT_UNROLL for (int q = 0; q < quads; ++q) {
        LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
          LIGHTKIT_UNROLL for (int t = 0; t < taps; ++t) {
            sum[r][t] = at::vec::fmadd(spread[q], Vec<T>(x[r + q / 2][q % 2 * channels + t]), sum[r][t]);
          }
        }
      }
      LIGHTKIT_UNROLL for (int r = 0; r < rows_read; ++r) {
        x[r] += step * channels;
      }
    }
  }
  LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL for (int t = 0; t < taps; ++t) {
      T* to = sums + r * row_stride + t * tap_stride;
      (Vec<T>::loadu(to) + sum[r][t]).store(to);
    }
  }
  if (bias_sum != nullptr) {
    (Vec<T>::loadu(bias_sum) + total).store(bias_sum);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// The same where all that an output reads fits a vector, `patch_row` to a row: each channel then takes its own inputs
// from it, those of the position that won, and there are no products with 0.
template <int rows, int taps>
void add_small_image(
    const ConvReluPoolShape& shape,
    const Outputs<float>& outputs,
    const float* image,
    float* sums,
    int64_t row_stride,
    int64_t tap_stride,
    float* bias_sum) {
  const int patch_row = static_cast<int>(shape.run() + shape.in_channels);
  const int patch_rows = static_cast<int>(shape.kernel_height + 1);
  const int channels = static_cast<int>(shape.in_channels);
  // Where the first input of a position lies in the patch, and that of a tap.
  const __m512i first = _mm512_setr_epi32(
      0, channels, patch_row, patch_row + channels, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512i moves[rows][taps];
  __m512 sum[rows][taps];
  LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL for (int t = 0; t < taps; ++t) {
      moves[r][t] = _mm512_set1_epi32(r * patch_row + t);
      sum[r][t] = _mm512_setzero_ps();
    }
  }
  __m512 total = _mm512_setzero_ps();
  const __mmask16 lanes = static_cast<__mmask16>((1u << outputs.count) - 1);
  int64_t output = 0;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const float* x = image + 2 * row * shape.row_size();
    for (int64_t column = 0; column < shape.columns(); ++column, ++output, x += 2 * shape.in_channels) {
      __m512 patch = _mm512_setzero_ps();
      for (int r = 0; r < patch_rows; ++r) {
        const auto mask = static_cast<__mmask16>(((1u << patch_row) - 1) << (r * patch_row));
        patch = _mm512_mask_expandloadu_ps(patch, mask, x + r * shape.row_size());
      }
      const int64_t at = output * outputs.stride;
      const __m512i winner = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, outputs.winners + at));
      const __mmask16 live = _mm512_mask_cmpneq_epi32_mask(lanes, winner, _mm512_set1_epi32(kDead));
      const __m512 gradient = _mm512_maskz_loadu_ps(live, outputs.grads + at);
      const __m512i place = _mm512_permutexvar_epi32(winner, first);
      LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
        LIGHTKIT_UNROLL for (int t = 0; t < taps; ++t) {
          const __m512 value = _mm512_permutexvar_ps(_mm512_add_epi32(place, moves[r][t]), patch);
          sum[r][t] = _mm512_fmadd_ps(gradient, value, sum[r][t]);
        }
      }
      total = _mm512_add_ps(total, gradient);
    }
  }
  LIGHTKIT_UNROLL for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL for (int t = 0; t < taps; ++t) {
      float* const to = sums + r * row_stride + t * tap_stride;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][t]));
    }
  }
  _mm512_storeu_ps(bias_sum, _mm512_add_ps(_mm512_loadu_ps(bias_sum), total));
}

// Whether all taps are summed at once, and a patch is a vector.
bool is_small(const ConvReluPoolShape& shape) {
  return shape.pool && shape.kernel_height <= kMostRows && shape.run() <= kMostTaps &&
      (shape.kernel_height + 1) * (shape.run() + shape.in_channels) <= 16;
}
#endif

// Calls f(n) with n, from 1 to 3, known when compiled.
template <typename F>
void with_constant(int64_t n, const F& f) {
  n == 1 ? f(std::integral_constant<int, 1>{})
      : n == 2 ? f(std::integral_constant<int, 2>{})
               : f(std::integral_constant<int, 3>{});
}

// One image: sums lie as (kernel_height, run, out_channels in whole vectors), and after them those of the bias.
template <typename T, int quads>
void add_all(
    const ConvReluPoolShape& shape, const T* grads, const uint8_t* winners, const T* image, T* sums) {
  const int64_t padded = (shape.out_channels + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
  for (int64_t channel = 0; channel < shape.out_channels; channel += kWidth<T>) {
    const Outputs<T> outputs{
        grads + channel,
        winners + channel,
        shape.out_channels,
        std::min<int64_t>(kWidth<T>, shape.out_channels - channel)};
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      if (is_small(shape)) {
        with_constant(shape.kernel_height, [&](auto rows) {
          with_constant(shape.run(), [&](auto taps) {
            add_small_image<rows, taps>(
                shape,
                outputs,
                image,
                sums + channel,
                shape.run() * padded,
                padded,
                sums + shape.taps() * padded + channel);
          });
        });
        continue;
      }
    }
#endif
    for (int64_t row = 0; row < shape.kernel_height; row += kMostRows) {
      for (int64_t tap = 0; tap < shape.run(); tap += kMostTaps) {
        with_constant(std::min<int64_t>(kMostRows, shape.kernel_height - row), [&](auto rows) {
          with_constant(std::min<int64_t>(kMostTaps, shape.run() - tap), [&](auto taps) {
            add_image<T, quads, rows, taps>(
                shape,
                outputs,
                image + row * shape.row_size() + tap,
                sums + (row * shape.run() + tap) * padded + channel,
                shape.run() * padded,
                padded,
                row == 0 && tap == 0 ? sums + shape.taps() * padded + channel : nullptr);
          });
        });
      }
    }
  }
}

// A unit is one of the parts.
template <typename T>
class ThinGradWeight final : public ConvReluPoolGradWeight<T> {
 public:
  explicit ThinGradWeight(const ConvReluPoolWeightProblem<T>& problem)
      : problem_(problem),
        padded_((problem.shape.out_channels + kWidth<T> - 1) / kWidth<T> * kWidth<T>),
        size_((problem.shape.taps() + 1) * padded_),
        sums_(units() * size_) {}

  int64_t units() const override {
    return std::min(kParts, problem_.images);
  }

  void run(int64_t begin, int64_t end) override {
    const auto& [shape, images, grad_output, index, input, grad_weight, grad_bias] = problem_;
    const auto add = shape.pool ? add_all<T, 4> : add_all<T, 1>;
    const int64_t parts = units();
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t image = part * images / parts; image < (part + 1) * images / parts; ++image) {
        add(shape,
            grad_output + image * shape.output_size(),
            index + image * shape.output_size(),
            input + image * shape.image_size(),
            sums_.data() + part * size_);
      }
    }
  }

  void finish() override {
    const auto& shape = problem_.shape;
    for (int64_t part = 1; part < units(); ++part) {
      for (int64_t i = 0; i < size_; ++i) {
        sums_[i] += sums_[part * size_ + i];
      }
    }
    for (int64_t k = 0; k < shape.kernel_size(); ++k) {
      for (int64_t in = 0; in < shape.in_channels; ++in) {
        const T* from = sums_.data() + (k * shape.in_channels + in) * padded_;
        for (int64_t out = 0; out < shape.out_channels; ++out) {
          problem_.grad_weight[out * shape.taps() + in * shape.kernel_size() + k] = from[out];
        }
      }
    }
    std::copy_n(sums_.data() + shape.taps() * padded_, shape.out_channels, problem_.grad_bias);
  }

 private:
  const ConvReluPoolWeightProblem<T> problem_;
  const int64_t padded_;
  const int64_t size_;
  std::vector<T> sums_;
};

}  // namespace

template <typename T>
bool is_thin(const ConvReluPoolShape& shape) {
  // Every part has sums of its own: they must not take many times the memory of the weight and the images.
  constexpr int64_t kMostSums = int64_t(1) << 20;
  const int64_t vectors = (shape.out_channels + kWidth<T> - 1) / kWidth<T>;
  if (shape.taps() * vectors * kWidth<T> > kMostSums) {
    return false;
  }
  // Where the products that are with 0 cost less than lists, and lanes that a run leaves empty: an estimate.
  return shape.quads() * shape.run() * 2 <= 3 * kWidth<T>;
}

template <typename T>
std::unique_ptr<ConvReluPoolGradWeight<T>> make_thin_grad_weight(const ConvReluPoolWeightProblem<T>& problem) {
  return std::make_unique<ThinGradWeight<T>>(problem);
}

template bool is_thin<float>(const ConvReluPoolShape&);
template bool is_thin<double>(const ConvReluPoolShape&);
template std::unique_ptr<ConvReluPoolGradWeight<float>> make_thin_grad_weight(
    const ConvReluPoolWeightProblem<float>&);
template std::unique_ptr<ConvReluPoolGradWeight<double>> make_thin_grad_weight(
    const ConvReluPoolWeightProblem<double>&);

}  // namespace lightkit::cpu
