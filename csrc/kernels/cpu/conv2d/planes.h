// The source of a correlation, rearranged so that the inputs of neighbouring results lie at a fixed distance: with
// zeros around, without the rows and columns that a stride leaves out, and in vectors of channels.
#pragma once

#include "correlation.h"
#include "register_tile.h"

#include <algorithm>
#include <vector>

namespace lightkit::cpu::conv2d {

inline int64_t floor_div(int64_t value, int64_t divisor) {
  return value >= 0 ? value / divisor : -ceil_div(-value, divisor);
}

// Source rows, or columns, with the same rest when divided by the step make up a plane, in which neighbouring results
// read neighbouring values.
template <typename T>
class Planes {
 public:
  // The planes of bands of about so many bytes, whose rows of results are a multiple of `multiple`. With `share_taps`,
  // the runs are those of multiply_row_tile. With `pad_pixels`, a pixel always takes whole vectors.
  Planes(
      const Correlation& correlation,
      int64_t bytes,
      int64_t multiple = 1,
      bool share_taps = false,
      bool pad_pixels = false)
      : c_(correlation) {
    // One and three channels, those of images, have no room between the pixels.
    const bool is_image = !pad_pixels && (c_.in_channels == 1 || c_.in_channels == 3);
    pixel_ = is_image ? c_.in_channels : kWidth<T>;
    vectors_ = ceil_div(c_.in_channels, pixel_);
    for (const Tap& tap : c_.taps) {
      const Plane plane{rest(tap.row, c_.row_step), rest(tap.column, c_.column_step)};
      if (std::find(planes_.begin(), planes_.end(), plane) == planes_.end()) {
        planes_.push_back(plane);
      }
    }
    const auto range = [&](auto&& place, int64_t step, int64_t& least) {
      least = 0;
      int64_t most = 0;
      for (size_t t = 0; t < c_.taps.size(); ++t) {
        const int64_t at = floor_div(place(c_.taps[t]), step);
        least = t == 0 ? at : std::min(least, at);
        most = t == 0 ? at : std::max(most, at);
      }
      return most - least;
    };
    const int64_t more_rows = range([](const Tap& tap) { return tap.row; }, c_.row_step, first_row_);
    const int64_t more_columns = range([](const Tap& tap) { return tap.column; }, c_.column_step, first_column_);
    columns_ = c_.columns + more_columns;
    const int64_t row_bytes =
        columns_ * pixel_ * vectors_ * static_cast<int64_t>(sizeof(T) * std::max<size_t>(1, planes_.size()));
    // At least as many rows of results as are read again for the next band.
    const int64_t most = std::max<int64_t>({1, more_rows, bytes / row_bytes - more_rows});
    band_rows_ = round_up(ceil_div(c_.rows, ceil_div(c_.rows, most)), multiple);
    bands_ = ceil_div(c_.rows, band_rows_);
    rows_ = band_rows_ + more_rows;
    if (share_taps) {
      make_shared_runs();
    } else {
      make_runs();
    }
  }

  // Returns true if the taps are rows of three that lie side by side in a plane.
  static bool can_share_taps(const Correlation& c) {
    bool can = c.column_step == 1 && c.taps.size() % 3 == 0;
    for (size_t t = 0; can && t < c.taps.size(); ++t) {
      const Tap& first = c.taps[t - t % 3];
      can = c.taps[t].row == first.row && c.taps[t].column == first.column + static_cast<int64_t>(t % 3);
    }
    return can;
  }

  // Elements of the planes of one band. Register tiles read up to kMaxPositions pixels beyond the last one.
  int64_t size() const {
    return vectors_ * vector_size() + std::max<int64_t>(kMaxPositions * pixel_, kWidth<T>);
  }
  // Bands of an image, and the rows of results of each; the last one may have fewer.
  int64_t bands() const {
    return bands_;
  }
  int64_t band_rows() const {
    return band_rows_;
  }
  // Returns a band of all images.
  Band band(int64_t index) const {
    const int64_t row = index % bands_ * band_rows_;
    return {index / bands_, row, std::min(band_rows_, c_.rows - row)};
  }
  // The distance of the inputs of neighbouring results, in a row and between rows.
  int64_t pixel() const {
    return pixel_;
  }
  int64_t row_size() const {
    return columns_ * pixel_;
  }
  // Vectors of channels, and the distance of their planes. There is one plane if the steps are 1.
  int64_t vectors() const {
    return vectors_;
  }
  int64_t vector_size() const {
    return static_cast<int64_t>(planes_.size()) * plane_size();
  }
  // The inputs of a result, relative to its place, in the order of `values`; with `share_taps`, the inputs of the first
  // of three taps, each of which has three of the values.
  const std::vector<Run>& runs() const {
    return runs_;
  }
  // The tap and the input channel of each value of the runs.
  struct Value {
    const Tap* tap;
    int64_t channel;
  };
  const std::vector<Value>& values() const {
    return values_;
  }

  // Writes the planes of a band.
  void fill(const Images<const T>& source, const Band& band, T* to) const {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t channel = v * pixel_;
      const int64_t channels = std::min(pixel_, c_.in_channels - channel);
      const Images<const T> from = source.from_channel(channel);
      for (const Plane& plane : planes_) {
        for (int64_t r = 0; r < rows_; ++r, to += row_size()) {
          const int64_t y = (band.row + first_row_ + r) * c_.row_step + plane.row;
          if (y < 0 || y >= c_.source_rows) {
            std::fill_n(to, row_size(), T(0));
          } else {
            fill_row(from.at(band.image, y, 0), from, plane.column, channels, to);
          }
        }
      }
    }
    std::fill_n(to, std::max<int64_t>(kMaxPositions * pixel_, kWidth<T>), T(0));
  }

 private:
  struct Plane {
    int64_t row;
    int64_t column;
    bool operator==(const Plane&) const = default;
  };

  static int64_t rest(int64_t value, int64_t divisor) {
    return value - floor_div(value, divisor) * divisor;
  }
  int64_t plane_size() const {
    return rows_ * row_size();
  }

  // The distance from a result's place to the input that a tap reads of a vector of channels.
  int64_t offset_of(const Tap& tap, int64_t vector) const {
    const Plane plane{rest(tap.row, c_.row_step), rest(tap.column, c_.column_step)};
    const int64_t index = std::find(planes_.begin(), planes_.end(), plane) - planes_.begin();
    return vector * vector_size() + index * plane_size() + (floor_div(tap.row, c_.row_step) - first_row_) * row_size() +
        (floor_div(tap.column, c_.column_step) - first_column_) * pixel_;
  }

  void make_shared_runs() {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t channel = v * pixel_;
      const int64_t channels = std::min(pixel_, c_.in_channels - channel);
      for (size_t t = 0; t < c_.taps.size(); t += 3) {
        runs_.push_back({offset_of(c_.taps[t], v), channels});
        for (int64_t i = 0; i < 3 * channels; ++i) {
          values_.push_back({&c_.taps[t + i % 3], channel + i / 3});
        }
      }
    }
  }

  void make_runs() {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t channel = v * pixel_;
      const int64_t channels = std::min(pixel_, c_.in_channels - channel);
      for (const Tap& tap : c_.taps) {
        const int64_t offset = offset_of(tap, v);
        if (!runs_.empty() && runs_.back().offset + runs_.back().length == offset && pixel_ < kWidth<T>) {
          runs_.back().length += channels;
        } else {
          runs_.push_back({offset, channels});
        }
        for (int64_t i = 0; i < channels; ++i) {
          values_.push_back({&tap, channel + i});
        }
      }
    }
  }

  // Writes a row of a plane: the columns of `from` with the rest `rest`.
  void fill_row(const T* from, const Images<const T>& source, int64_t rest, int64_t channels, T* to) const {
    constexpr int width = kWidth<T>;
    // The columns before `begin` and from `end` on are outside of the source.
    const int64_t first = first_column_ * c_.column_step + rest;
    const int64_t begin = std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, -first), c_.column_step), 0, columns_);
    const int64_t end =
        std::clamp<int64_t>(floor_div(c_.source_columns - 1 - first, c_.column_step) + 1, begin, columns_);
    std::fill_n(to, begin * pixel_, T(0));
    from += (first + begin * c_.column_step) * source.column;
    T* pixel = to + begin * pixel_;
    const int64_t step = c_.column_step * source.column;
    if (source.channel == 1 && channels == pixel_ && step == pixel_) {
      std::copy_n(from, (end - begin) * pixel_, pixel);
    } else if (source.channel == 1 && channels == width) {
      for (int64_t column = begin; column < end; ++column, from += step, pixel += width) {
        Vec<T>::loadu(from).store(pixel);
      }
    } else if (source.channel == 1 && pixel_ == width) {
      for (int64_t column = begin; column < end; ++column, from += step, pixel += width) {
        Vec<T>::loadu(from, channels).store(pixel);
      }
    } else {
      for (int64_t column = begin; column < end; ++column, from += step, pixel += pixel_) {
        for (int64_t i = 0; i < channels; ++i) {
          pixel[i] = from[i * source.channel];
        }
      }
    }
    std::fill_n(to + end * pixel_, (columns_ - end) * pixel_, T(0));
  }

  const Correlation& c_;
  std::vector<Plane> planes_;
  std::vector<Run> runs_;
  std::vector<Value> values_;
  int64_t pixel_;
  int64_t vectors_;
  int64_t first_row_;
  int64_t first_column_;
  int64_t rows_;
  int64_t columns_;
  int64_t bands_;
  int64_t band_rows_;
};

}  // namespace lightkit::cpu::conv2d
