// The two backward passes over the rows: the sums, and the gradients of input and residual.

#include "../common/aligned_buffer.h"
#include "groups.h"
#include "passes.h"

namespace lightkit::cpu::norm_act {
namespace {

// Reads the gradients of the normalized input, without a pool.
template <typename T, typename G>
class RowReader {
 public:
  RowReader(const Gradient<T>& gradient, const G& group) : gradient_(gradient), group_(group) {}

  void start(int64_t row) {
    grad_ = gradient_.grad_output + row * gradient_.shape.channels;
    if (gradient_.live != nullptr) {
      bits_ = group_.load_bits(gradient_.live + row * gradient_.shape.bit_bytes());
    }
  }
  Lanes<T> load(int vector) const {
    const auto values = group_.load(grad_, vector);
    return gradient_.live == nullptr ? values : keep_lanes<T>(values, bits_ >> vector * kWidth<T>);
  }

 private:
  const Gradient<T>& gradient_;
  const G& group_;
  const T* grad_ = nullptr;
  uint64_t bits_ = 0;
};

template <typename T, typename G>
void sum_rows(
    const Gradient<T>& gradient,
    const T* input,
    const typename G::Array& mean,
    const G& group,
    int64_t begin,
    int64_t end,
    Sums<G>& sums) {
  Sums<G>::for_each_row(begin, end, [&](int64_t row, int turn) {
    RowReader<T, G> reader(gradient, group);
    reader.start(row);
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      const auto g = reader.load(v);
      sums.add(turn, v, g, g * (group.load(input + row * gradient.shape.channels, v) - mean[v]));
    }
  });
}

template <typename T, typename G>
void sum_windows(
    const Gradient<T>& gradient,
    const T* input,
    const typename G::Array& mean,
    const G& group,
    int64_t begin,
    int64_t end,
    Sums<G>& sums) {
  using Numbers = LaneNumbers<T>;
  const int64_t channels = gradient.shape.channels;
  const int64_t image_row = gradient.shape.width * channels;
  const int64_t offsets[] = {0, channels, image_row, image_row + channels};
  WindowCursor cursor(gradient.shape, begin);
  Sums<G>::for_each_row(begin, end, [&](int64_t window, int turn) {
    const T* const at = input + cursor.row() * channels;
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      const auto argmax = __builtin_convertvector(group.load_bytes(gradient.live + window * channels, v), Numbers);
      const auto upstream = group.load(gradient.grad_output + window * channels, v);
      const auto g = argmax >= Numbers{} + kDead ? Lanes<T>{} : upstream;
      auto x = group.load(at, v);
      LIGHTKIT_UNROLL
      for (int q = 1; q < 4; ++q) {
        x = argmax == Numbers{} + q ? group.load(at + offsets[q], v) : x;
      }
      sums.add(turn, v, g, g * (x - mean[v]));
    }
    cursor.advance();
  });
}

// The coefficients of a group, in registers.
template <typename T, typename G>
class Coefficients {
 public:
  Coefficients(const GradientOutputs<T>& outputs, const G& group) : centered_(outputs.slope != nullptr) {
    group.load(outputs.scale, scale_);
    if (centered_) {
      group.load(outputs.mean, mean_);
      group.load(outputs.slope, slope_);
      group.load(outputs.offset, offset_);
    }
  }

  // Writes the gradients of a vector of a row; `at` is the offset of the row.
  void write(
      const GradientOutputs<T>& outputs, const G& group, int64_t at, int vector, const Lanes<T>& gradient) const {
    if (outputs.grad_input != nullptr) {
      auto result = gradient * scale_[vector];
      if (centered_) {
        result += (group.load(outputs.input + at, vector) - mean_[vector]) * slope_[vector] + offset_[vector];
      }
      group.store(result, outputs.grad_input + at, vector);
    }
    if (outputs.grad_residual != nullptr) {
      group.store(gradient, outputs.grad_residual + at, vector);
    }
  }

 private:
  const bool centered_;
  typename G::Array scale_, mean_, slope_, offset_;
};

template <typename T, typename G>
void write_rows(
    const Gradient<T>& gradient, const GradientOutputs<T>& outputs, const G& group, int64_t begin, int64_t end) {
  const Coefficients<T, G> coefficients(outputs, group);
  RowReader<T, G> reader(gradient, group);
  for (int64_t row = begin; row < end; ++row) {
    reader.start(row);
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      coefficients.write(outputs, group, row * gradient.shape.channels, v, reader.load(v));
    }
  }
}

// Writes rows to which no window of the pool belongs.
template <typename T, typename G>
void write_dropped(
    const Gradient<T>& gradient,
    const GradientOutputs<T>& outputs,
    const G& group,
    const Coefficients<T, G>& coefficients,
    int64_t begin,
    int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int v = 0; v < G::vectors; ++v) {
      coefficients.write(outputs, group, row * gradient.shape.channels, v, Lanes<T>{});
    }
  }
}

// Writes the two rows of an image, and an odd last one, that belong to a row of the output.
template <typename T, typename G>
void write_windows(const Gradient<T>& gradient, const GradientOutputs<T>& outputs, const G& group, int64_t out_row) {
  using Numbers = LaneNumbers<T>;
  const Shape& shape = gradient.shape;
  const int64_t channels = shape.channels;
  const int64_t columns = shape.out_width();
  const int64_t image_row = shape.width * channels;
  const int64_t offsets[] = {0, channels, image_row, image_row + channels};
  const Coefficients<T, G> coefficients(outputs, group);
  const int64_t image = out_row / shape.out_height();
  const int64_t row_of_image = 2 * (out_row % shape.out_height());
  const int64_t first = (image * shape.height + row_of_image) * shape.width;
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t window = out_row * columns + column;
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      const auto argmax = __builtin_convertvector(group.load_bytes(gradient.live + window * channels, v), Numbers);
      const auto upstream = group.load(gradient.grad_output + window * channels, v);
      LIGHTKIT_UNROLL
      for (int q = 0; q < 4; ++q) {
        const auto g = argmax == Numbers{} + q ? upstream : Lanes<T>{};
        coefficients.write(outputs, group, (first + 2 * column) * channels + offsets[q], v, g);
      }
    }
  }
  if (shape.width % 2 != 0) {
    for (const int64_t end : {first + shape.width, first + 2 * shape.width}) {
      write_dropped(gradient, outputs, group, coefficients, end - 1, end);
    }
  }
  if (row_of_image + 3 == shape.height) {
    const int64_t last = first + 2 * shape.width;
    write_dropped(gradient, outputs, group, coefficients, last, last + shape.width);
  }
}

}  // namespace

template <typename T>
void gradient_sums(const Gradient<T>& gradient, const T* input, const T* mean, double* sum, double* dot) {
  const int64_t channels = gradient.shape.channels;
  const bool pool = gradient.shape.pool;
  const Parts parts(gradient.shape.out_rows());
  // [parts, 2, channels].
  AlignedBuffer<double> sums(parts.count() * 2 * channels);
  std::fill_n(sums.data(), parts.count() * 2 * channels, 0.0);
  parts.for_each(pool ? 4 * channels : channels, [&](int64_t part) {
    double* const own = sums.data() + part * 2 * channels;
    parts.for_each_block(part, [&](int64_t begin, int64_t end) {
      for_each_group<T>(channels, [&](auto group) {
        using G = decltype(group);
        typename G::Array center;
        group.load(mean, center);
        // Sums of the sums of chains: behind a mean over the image the gradients are equal, and a long chain of equal
        // numbers adds up its rounding errors.
        typename G::Array of_block[2] = {};
        for (int64_t row = begin; row < end; row += kChainRows) {
          const int64_t next = std::min(end, row + kChainRows);
          Sums<G> chains;
          if (pool) {
            sum_windows(gradient, input, center, group, row, next, chains);
          } else {
            sum_rows(gradient, input, center, group, row, next, chains);
          }
          LIGHTKIT_UNROLL
          for (int v = 0; v < G::vectors; ++v) {
            of_block[0][v] += chains.first(v);
            of_block[1][v] += chains.second(v);
          }
        }
        for (int v = 0; v < G::vectors; ++v) {
          const auto first = of_block[0][v];
          const auto second = of_block[1][v];
          for (int64_t lane = 0; lane < group.lanes; ++lane) {
            const int64_t channel = group.channel + v * kWidth<T> + lane;
            own[channel] += first[lane];
            own[channels + channel] += second[lane];
          }
        }
      });
    });
  });
  std::fill_n(sum, channels, 0.0);
  std::fill_n(dot, channels, 0.0);
  for (int64_t part = 0; part < parts.count(); ++part) {
    const double* const own = sums.data() + part * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += own[c];
      dot[c] += own[channels + c];
    }
  }
}

template <typename T>
void write_gradients(const Gradient<T>& gradient, const GradientOutputs<T>& outputs) {
  const Shape& shape = gradient.shape;
  const int64_t channels = shape.channels;
  if (shape.pool) {
    const int64_t out_rows = shape.images * shape.out_height();
    for_each_tile<T>(out_rows, 2 * shape.width * channels, [&](int64_t begin, int64_t end) {
      for (int64_t out_row = begin; out_row < end; ++out_row) {
        for_each_group<T>(channels, [&](auto group) { write_windows(gradient, outputs, group, out_row); });
      }
    });
  } else {
    for_each_tile<T>(shape.rows(), channels, [&](int64_t begin, int64_t end) {
      for_each_group<T>(channels, [&](auto group) { write_rows(gradient, outputs, group, begin, end); });
    });
  }
}

template void gradient_sums(const Gradient<float>&, const float*, const float*, double*, double*);
template void gradient_sums(const Gradient<double>&, const double*, const double*, double*, double*);
template void write_gradients(const Gradient<float>&, const GradientOutputs<float>&);
template void write_gradients(const Gradient<double>&, const GradientOutputs<double>&);

}  // namespace lightkit::cpu::norm_act
