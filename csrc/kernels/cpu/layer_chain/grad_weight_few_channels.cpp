// The gradient of the weight where a position reads few inputs in a row, as with a single input channel.
//
// A vector holds output channels. The gradient of an output is spread over its window: it is 0 at every position except
// the one that won. With a pool that takes four times the multiply-adds of grad_weight.cpp, except that no list is made
// and every lane is used.

#include "grad_weight_few_channels.h"

#include "tuning.h"

#include "../../common/ceil_div.h"

#include <type_traits>
#include <vector>

namespace lightkit::cpu::layer_chain {
namespace {

// The outputs of one image, for one vector of output channels.
template <typename T>
struct ChannelVector {
  const T* gradients;     // [positions, channels], positions `stride` apart
  const uint8_t* argmax;  // as `gradients`
  int64_t stride;
  int64_t channels;  // at most a vector

  // Writes the gradient of one output at each position of its window: 0 except where the argmax is. Returns the
  // gradient, 0 for a dead output.
  template <int window>
  Vec<T> load(int64_t output, Vec<T> (&spread)[window]) const {
    const T* grad = gradients + output * stride;
    const auto gradient = load_lanes<Lanes<T>>(grad, channels);
    const auto bytes = load_lanes<LaneBytes<T>>(argmax + output * stride, channels);
    const auto winner = __builtin_convertvector(bytes, LaneNumbers<T>);
    LIGHTKIT_UNROLL
    for (int q = 0; q < window; ++q) {
      spread[q] = vectorized<T>(winner == q ? gradient : Lanes<T>{});
    }
    return vectorized<T>(winner != kDead ? gradient : Lanes<T>{});
  }
};

// Adds the products of one image's gradients and inputs to the sums of some rows and taps of the kernel, and its
// gradients to the sum of the bias.
template <typename T, int window, int rows, int taps>
void add_image(
    const Shape& shape,
    const ChannelVector<T>& outputs,
    const T* image,  // [height, width, in_channels], from the first row and tap on
    T* sums,         // [rows, taps, width], rows `row_stride` and taps `tap_stride` apart
    int64_t row_stride,
    int64_t tap_stride,
    T* bias_sum) {  // [width], or null
  constexpr int step = window == 4 ? 2 : 1;
  constexpr int rows_read = rows + step - 1;
  Vec<T> sum[rows][taps];
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL
    for (int t = 0; t < taps; ++t) {
      sum[r][t] = Vec<T>(T(0));
    }
  }
  Vec<T> total(T(0));
  const int64_t channels = shape.in_channels;
  int64_t output = 0;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const T* x[rows_read];
    LIGHTKIT_UNROLL
    for (int r = 0; r < rows_read; ++r) {
      x[r] = image + (row * step + r) * shape.row_size();
    }
    for (int64_t column = 0; column < shape.columns(); ++column, ++output) {
      Vec<T> spread[window];
      total = total + outputs.load(output, spread);
      LIGHTKIT_UNROLL
      for (int q = 0; q < window; ++q) {
        LIGHTKIT_UNROLL
        for (int r = 0; r < rows; ++r) {
          LIGHTKIT_UNROLL
          for (int t = 0; t < taps; ++t) {
            sum[r][t] = at::vec::fmadd(spread[q], Vec<T>(x[r + q / 2][q % 2 * channels + t]), sum[r][t]);
          }
        }
      }
      LIGHTKIT_UNROLL
      for (int r = 0; r < rows_read; ++r) {
        x[r] += step * channels;
      }
    }
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL
    for (int t = 0; t < taps; ++t) {
      T* to = sums + r * row_stride + t * tap_stride;
      (Vec<T>::loadu(to) + sum[r][t]).store(to);
    }
  }
  if (bias_sum != nullptr) {
    (Vec<T>::loadu(bias_sum) + total).store(bias_sum);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// The same if the inputs of a window fit one vector. Each channel picks the inputs of the position that won from that
// vector, so that no product is with 0.
template <int rows, int taps>
void add_small_image(
    const Shape& shape,
    const ChannelVector<float>& outputs,
    const float* image,  // [height, width, in_channels]
    float* sums,         // [rows, taps, width], rows `row_stride` and taps `tap_stride` apart
    int64_t row_stride,
    int64_t tap_stride,
    float* bias_sum) {  // [width]
  const int patch_row = static_cast<int>(shape.run() + shape.in_channels);
  const int patch_rows = static_cast<int>(shape.kernel_height + 1);
  const int channels = static_cast<int>(shape.in_channels);
  // The offsets in the patch of a position's first input, and of a tap from there.
  const __m512i first =
      _mm512_setr_epi32(0, channels, patch_row, patch_row + channels, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512i tap_offsets[rows][taps];
  __m512 sum[rows][taps];
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL
    for (int t = 0; t < taps; ++t) {
      tap_offsets[r][t] = _mm512_set1_epi32(r * patch_row + t);
      sum[r][t] = _mm512_setzero_ps();
    }
  }
  __m512 total = _mm512_setzero_ps();
  const __mmask16 lanes = static_cast<__mmask16>((1u << outputs.channels) - 1);
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
      const __m512i winner = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, outputs.argmax + at));
      const __mmask16 live = _mm512_mask_cmpneq_epi32_mask(lanes, winner, _mm512_set1_epi32(kDead));
      const __m512 gradient = _mm512_maskz_loadu_ps(live, outputs.gradients + at);
      const __m512i place = _mm512_permutexvar_epi32(winner, first);
      LIGHTKIT_UNROLL
      for (int r = 0; r < rows; ++r) {
        LIGHTKIT_UNROLL
        for (int t = 0; t < taps; ++t) {
          const __m512 value = _mm512_permutexvar_ps(_mm512_add_epi32(place, tap_offsets[r][t]), patch);
          sum[r][t] = _mm512_fmadd_ps(gradient, value, sum[r][t]);
        }
      }
      total = _mm512_add_ps(total, gradient);
    }
  }
  LIGHTKIT_UNROLL
  for (int r = 0; r < rows; ++r) {
    LIGHTKIT_UNROLL
    for (int t = 0; t < taps; ++t) {
      float* const to = sums + r * row_stride + t * tap_stride;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][t]));
    }
  }
  _mm512_storeu_ps(bias_sum, _mm512_add_ps(_mm512_loadu_ps(bias_sum), total));
}

// True if one pass sums all taps, and the inputs of a window fit one vector.
bool fits_vector(const Shape& shape) {
  return shape.pool && shape.kernel_height <= kMaxTapRows && shape.run() <= kMaxTaps &&
      (shape.kernel_height + 1) * (shape.run() + shape.in_channels) <= 16;
}
#endif

// Calls f(n), with n from 1 to 3 as a compile-time constant.
template <typename F>
void with_constant(int64_t n, const F& f) {
  n == 1       ? f(std::integral_constant<int, 1>{})
      : n == 2 ? f(std::integral_constant<int, 2>{})
               : f(std::integral_constant<int, 3>{});
}

// Adds one image to all sums.
template <typename T, int window>
void add_all(
    const Shape& shape,
    const T* gradients,     // [positions, out_channels]
    const uint8_t* argmax,  // as `gradients`
    const T* image,         // [height, width, in_channels]
    T* sums) {              // [kernel_height * run + 1, out_channels in whole vectors]; the last row is the bias
  const int64_t padded = round_up(shape.out_channels, kWidth<T>);
  for (int64_t channel = 0; channel < shape.out_channels; channel += kWidth<T>) {
    const ChannelVector<T> outputs{
        gradients + channel,
        argmax + channel,
        shape.out_channels,
        std::min<int64_t>(kWidth<T>, shape.out_channels - channel)};
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      if (fits_vector(shape)) {
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
    for (int64_t row = 0; row < shape.kernel_height; row += kMaxTapRows) {
      for (int64_t tap = 0; tap < shape.run(); tap += kMaxTaps) {
        with_constant(std::min<int64_t>(kMaxTapRows, shape.kernel_height - row), [&](auto rows) {
          with_constant(std::min<int64_t>(kMaxTaps, shape.run() - tap), [&](auto taps) {
            add_image<T, window, rows, taps>(
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

// A work item is one of kImageParts parts of the images.
template <typename T>
class FewChannelsGradWeight final : public GradWeightKernel<T> {
 public:
  explicit FewChannelsGradWeight(const GradWeightProblem<T>& problem)
      : problem_(problem),
        padded_(round_up(problem.shape.out_channels, kWidth<T>)),
        size_((problem.shape.taps() + 1) * padded_),
        sums_(work_items() * size_) {}

  int64_t work_items() const override {
    return std::min(kImageParts, problem_.images);
  }

  void run(int64_t begin, int64_t end) override {
    const auto& [shape, images, grad_output, argmax, input, grad_weight, grad_bias] = problem_;
    const auto add = shape.pool ? add_all<T, 4> : add_all<T, 1>;
    const int64_t parts = work_items();
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t image = part * images / parts; image < (part + 1) * images / parts; ++image) {
        add(shape,
            grad_output + image * shape.output_size(),
            argmax + image * shape.output_size(),
            input + image * shape.image_size(),
            sums_.data() + part * size_);
      }
    }
  }

  int64_t finish_items() const override {
    return 1;
  }

  void finish(int64_t /*begin*/, int64_t /*end*/) override {
    const auto& shape = problem_.shape;
    for (int64_t part = 1; part < work_items(); ++part) {
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
  const GradWeightProblem<T> problem_;
  const int64_t padded_;
  const int64_t size_;
  std::vector<T> sums_;
};

}  // namespace

template <typename T>
std::unique_ptr<GradWeightKernel<T>> make_few_channels_grad_weight(const GradWeightProblem<T>& problem) {
  return std::make_unique<FewChannelsGradWeight<T>>(problem);
}

template std::unique_ptr<GradWeightKernel<float>> make_few_channels_grad_weight(const GradWeightProblem<float>&);
template std::unique_ptr<GradWeightKernel<double>> make_few_channels_grad_weight(const GradWeightProblem<double>&);

}  // namespace lightkit::cpu::layer_chain
