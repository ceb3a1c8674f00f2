// The two backward passes over the rows: the sums, and the gradients of input and residual.

#include "../common/aligned_buffer.h"
#include "groups.h"
#include "passes.h"

namespace lightkit::cpu::norm_act {
namespace {

// Reads the gradients of the normalized input, without a max-pool: of rows from `first` on, which are of one image if
// the output is its mean.
template <typename T, typename G>
class RowReader {
 public:
  RowReader(const Gradient<T>& gradient, const G& group, int64_t first)
      : gradient_(gradient),
        group_(group),
        stride_(gradient.shape.is_mean() ? 0 : gradient.shape.channels),
        grad_output_(
            gradient.shape.is_mean()
                ? gradient.grad_output + first / gradient.shape.image_rows() * gradient.shape.channels
                : gradient.grad_output) {}

  void start(int64_t row) {
    grad_ = grad_output_ + row * stride_;
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
  const int64_t stride_;
  const T* const grad_output_;
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
  RowReader<T, G> reader(gradient, group, begin);
  Sums<G>::for_each_row(begin, end, [&](int64_t row, int turn) {
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
  RowReader<T, G> reader(gradient, group, begin);
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
  const bool is_max = gradient.shape.is_max();
  const Parts parts(gradient.shape.gradient_rows());
  // [parts, 2, channels].
  AlignedBuffer<double> sums(parts.count() * 2 * channels);
  std::fill_n(sums.data(), parts.count() * 2 * channels, 0.0);
  const int64_t elements = is_max ? 4 * channels : channels;
  parts.for_each(elements, [&](int64_t part) {
    double* const own = sums.data() + part * 2 * channels;
    BlockSums<T> block(channels);
    parts.for_each_block(part, [&](int64_t begin, int64_t end) {
      block.clear();
      for (int64_t row = begin, next; row < end; row = next) {
        next = gradient.shape.end_of_run(row, std::min(end, row + chain_rows<T>(elements)));
        for_each_group<T>(channels, [&](auto group) {
          using G = decltype(group);
          typename G::Array center;
          group.load(mean, center);
          Sums<G> chains;
          if (is_max) {
            sum_windows(gradient, input, center, group, row, next, chains);
          } else {
            sum_rows(gradient, input, center, group, row, next, chains);
          }
          block.add(group, chains);
        });
      }
      for (int64_t c = 0; c < 2 * channels; ++c) {
        own[c] += block.first()[c];
      }
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
  if (shape.is_max()) {
    const int64_t out_rows = shape.images * shape.out_height();
    for_each_tile<T>(out_rows, 2 * shape.width * channels, [&](int64_t begin, int64_t end) {
      for (int64_t out_row = begin; out_row < end; ++out_row) {
        for_each_group<T>(channels, [&](auto group) { write_windows(gradient, outputs, group, out_row); });
      }
    });
  } else {
    for_each_tile<T>(shape.rows(), channels, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin, next; row < end; row = next) {
        next = shape.end_of_run(row, end);
        for_each_group<T>(channels, [&](auto group) { write_rows(gradient, outputs, group, row, next); });
      }
    });
  }
}

template void gradient_sums(const Gradient<float>&, const float*, const float*, double*, double*);
template void gradient_sums(const Gradient<double>&, const double*, const double*, double*, double*);
template void write_gradients(const Gradient<float>&, const GradientOutputs<float>&);
template void write_gradients(const Gradient<double>&, const GradientOutputs<double>&);

}  // namespace lightkit::cpu::norm_act
