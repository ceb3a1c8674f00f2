// Mean and variance of the channels of a result, from the moments of its parts.
#pragma once

#include "tuning.h"

#include <algorithm>
#include <vector>

namespace lightkit::cpu::conv2d {

// Count, mean and sum of squared deviations of each channel of a part.
class Moments {
 public:
  explicit Moments(int64_t channels) : mean_(channels, 0.0), squares_(channels, 0.0) {}

  // Adds `count` values of `channels` channels, given their sums and the sums of their squares after a shift. (Chan,
  // Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.)
  template <typename T>
  void add(
      int64_t channel, int64_t channels, double before, double count, const T* shift, const T* sum, const T* square) {
    const double total = before + count;
    for (int64_t i = 0; i < channels; ++i) {
      const double mean = sum[i] / count;
      const double squares = square[i] - sum[i] * mean;
      // Rounding can make it negative; NaN stays.
      join(channel + i, before, count, total, shift[i] + mean, squares < 0 ? 0 : squares);
    }
  }

  void add_count(double count) {
    count_ += count;
  }
  double count() const {
    return count_;
  }

  void add(const Moments& other) {
    if (other.count_ == 0) {
      return;
    }
    const double total = count_ + other.count_;
    for (size_t i = 0; i < mean_.size(); ++i) {
      join(i, count_, other.count_, total, other.mean_[i], other.squares_[i]);
    }
    count_ = total;
  }

  template <typename T>
  void write(T* mean, T* variance) const {
    for (size_t i = 0; i < mean_.size(); ++i) {
      mean[i] = static_cast<T>(mean_[i]);
      variance[i] = static_cast<T>(squares_[i] / count_);
    }
  }

 private:
  void join(size_t i, double before, double count, double total, double mean, double squares) {
    const double delta = mean - mean_[i];
    mean_[i] += delta * (count / total);
    squares_[i] += squares + delta * delta * (before * count / total);
  }

  double count_ = 0;
  std::vector<double> mean_;
  std::vector<double> squares_;
};

// Sums of values, and of their squares, after a shift that is near to them.
template <typename T>
struct ShiftedSums {
  Vec<T> shift;
  Vec<T> sum = Vec<T>(T(0));
  Vec<T> square = Vec<T>(T(0));

  void add(const Vec<T>& value) {
    const Vec<T> d = value - shift;
    sum = sum + d;
    square = at::vec::fmadd(d, d, square);
  }
  void add(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c, const Vec<T>& d) {
    const Vec<T> da = a - shift, db = b - shift, dc = c - shift, dd = d - shift;
    sum = sum + ((da + db) + (dc + dd));
    square = square + (at::vec::fmadd(da, da, db * db) + at::vec::fmadd(dc, dc, dd * dd));
  }
  void add_to(Moments& moments, int64_t channel, int64_t channels, double before, double count) const {
    alignas(64) T lanes[3][kWidth<T>];
    shift.store(lanes[0]);
    sum.store(lanes[1]);
    square.store(lanes[2]);
    moments.add(channel, channels, before, count, lanes[0], lanes[1], lanes[2]);
  }
};

// Adds the results of a band.
template <typename T>
void add_results(Moments& moments, const Images<T>& results, const Band& band, int64_t columns, int64_t channels) {
  constexpr int width = kWidth<T>;
  const int64_t at_once = std::max<int64_t>(1, kSummedPositions / columns);
  for (int64_t begin = band.row; begin < band.row + band.rows; begin += at_once) {
    const int64_t end = std::min(band.row + band.rows, begin + at_once);
    const double count = static_cast<double>((end - begin) * columns);
    for (int64_t c = 0; c < channels; c += width) {
      const int64_t lanes = std::min<int64_t>(width, channels - c);
      const auto value = [&](int64_t y, int64_t x) { return Vec<T>::loadu(results.at(band.image, y, x) + c, lanes); };
      ShiftedSums<T> sums{value((begin + end) / 2, columns / 2)};
      for (int64_t y = begin; y < end; ++y) {
        int64_t x = 0;
        for (; x + 4 <= columns; x += 4) {
          sums.add(value(y, x), value(y, x + 1), value(y, x + 2), value(y, x + 3));
        }
        for (; x < columns; ++x) {
          sums.add(value(y, x));
        }
      }
      sums.add_to(moments, c, lanes, moments.count(), count);
    }
    moments.add_count(count);
  }
}

}  // namespace lightkit::cpu::conv2d
