// What cross-entropy does to a tile of logits that lies classes by rows: a row is a lane of a vector, so that sums over
// classes need no sums within a vector.
#pragma once

#include "cross_entropy_softcap.h"
#include "linear_cross_entropy.h"
#include "operands.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace lightkit::cpu {

// Classes to a tile.
constexpr int64_t kTileClasses = 64;

// Rows to a tile, and what the number of rows in memory is rounded up to: whole vectors of every type.
constexpr int64_t kTileRows = 128;
constexpr int64_t kRowMultiple = 32;

// Sums of exponentials that a tile has at a time.
constexpr int kChains = 4;

// What is known of the sum of exponentials of some rows after a number of classes. One value a row; rows that pad the
// last vector have values, too.
template <typename acc_t>
struct RowSums {
  acc_t* maximum;
  acc_t* sum;     // of exp(u - maximum)
  acc_t* soft;    // sum of weight_c u_c, for label smoothing

  static constexpr int64_t kFields = 3;

  void reset(int64_t rows) const {
    // The lowest finite number rather than -inf: -inf - -inf would make NaN of classes that a bias rules out.
    std::fill_n(maximum, rows, std::numeric_limits<acc_t>::lowest());
    std::fill_n(sum, rows, acc_t(0));
    std::fill_n(soft, rows, acc_t(0));
  }
};

// What the gradient with respect to the logits of a row consists of:
//   factor exp(u - maximum) - soft weight_c, times the slope of the softcap; and target at the target.
template <typename acc_t>
struct RowGradients {
  acc_t* maximum;
  acc_t* factor;
  acc_t* soft;
  acc_t* target;

  static constexpr int64_t kFields = 4;
};

// What stays of a tile of logits until the sums of its rows are known.
template <typename operand_t, typename acc_t>
struct KeptTile {
  Matrix<operand_t> exponentials;  // exp(u - shift)
  acc_t* shifts;                   // of each row
};

template <typename scalar_t>
class LogitTile {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;

  // (classes, rows) logits of the classes from `first` on; `rows` is a multiple of kRowMultiple.
  LogitTile(
      const LinearCrossEntropy<scalar_t>& args, Matrix<acc_t> logits, int64_t first, int64_t classes, int64_t rows)
      : args_(args), logits_(logits), first_(first), classes_(classes), rows_(rows) {}

  // Bias and softcap: products become logits.
  void finish_logits() const {
    if (args_.linear_bias == nullptr && args_.softcap == 0) {
      return;
    }
    for (int64_t c = 0; c < classes_; ++c) {
      const Vec bias(args_.linear_bias == nullptr ? acc_t(0) : args_.linear_bias[first_ + c]);
      acc_t* row = logits_.at(c, 0).data;
      for (int64_t r = 0; r < rows_; r += Vec::size()) {
        Vec u = Vec::loadu(row + r) + bias;
        if (args_.softcap != 0) {
          u = capped(u, args_.softcap);
        }
        u.store(row + r);
      }
    }
  }

  // Takes the tile into the sums of its rows. With `kept`, exp(u - shift) stays there, and in `shifts` the shift that a
  // row had in this tile.
  template <typename operand_t>
  void add_to(const RowSums<acc_t>& sums, const KeptTile<operand_t, acc_t>* kept) const {
    constexpr int parts = Pack<operand_t>::parts;
    for (int64_t r = 0; r < rows_; r += Pack<operand_t>::size) {
      std::array<Vec, parts> maximum;
      for (int k = 0; k < parts; ++k) {
        maximum[k] = Vec::loadu(sums.maximum + r + k * Vec::size());
      }
      const std::array<Vec, parts> before = maximum;
      for (int64_t c = 0; c < classes_; ++c) {
        for (int k = 0; k < parts; ++k) {
          // NaN may or may not come through: the sum is what carries it.
          maximum[k] = at::vec::clamp_min(logit(c, r + k * Vec::size()), maximum[k]);
        }
      }
      // In several sums of a tile each: small terms would get lost in a long chain with a large one.
      std::array<std::array<Vec, parts>, kChains> chains;
      for (auto& chain : chains) {
        chain.fill(Vec(acc_t(0)));
      }
      const auto add = [&](int64_t c, std::array<Vec, parts>& chain) {
        Pack<operand_t> e;
        for (int k = 0; k < parts; ++k) {
          e.part[k] = exp_bounded(logit(c, r + k * Vec::size()) - maximum[k]);
          chain[k] = chain[k] + e.part[k];
        }
        if (kept != nullptr) {
          e.store(kept->exponentials.at(c, r).data);
        }
      };
      int64_t c = 0;
      for (; c + kChains <= classes_; c += kChains) {
        for (int i = 0; i < kChains; ++i) {
          add(c + i, chains[i]);
        }
      }
      for (; c < classes_; ++c) {
        add(c, chains[0]);
      }
      for (int k = 0; k < parts; ++k) {
        const Vec sum = Vec::loadu(sums.sum + r + k * Vec::size()) * exp_bounded(before[k] - maximum[k]);
        (sum + ((chains[0][k] + chains[1][k]) + (chains[2][k] + chains[3][k]))).store(sums.sum + r + k * Vec::size());
        maximum[k].store(sums.maximum + r + k * Vec::size());
        if (kept != nullptr) {
          maximum[k].store(kept->shifts + r + k * Vec::size());
        }
      }
    }
    if (args_.smoothing == 0) {
      return;
    }
    for (int64_t r = 0; r < rows_; r += Vec::size()) {
      // Summed over the tile first: long chains of additions lose digits.
      Vec soft(acc_t(0));
      for (int64_t c = 0; c < classes_; ++c) {
        soft = at::vec::fmadd(Vec(weight(c)), logit(c, r), soft);
      }
      (Vec::loadu(sums.soft + r) + soft).store(sums.soft + r);
    }
  }

  // Sets what `targets` of the first `count` rows have for logits, where they are in this tile.
  void pick_targets(const int64_t* targets, int64_t count, acc_t* target_logits) const {
    for (int64_t r = 0; r < count; ++r) {
      if (is_here(targets[r])) {
        target_logits[r] = *logits_.at(targets[r] - first_, r).data;
      }
    }
  }

  // The gradient with respect to the logits, from these.
  template <typename operand_t>
  void write_gradient(const RowGradients<acc_t>& row, Matrix<operand_t> gradient) const {
    write_gradient(row, gradient, [&](int64_t r) {
      const Vec maximum = Vec::loadu(row.maximum + r), factor = Vec::loadu(row.factor + r);
      return [this, maximum, factor, r](int64_t c, const Vec&) {
        const Vec u = logit(c, r);
        return std::pair(exp_bounded(u - maximum) * factor, u);
      };
    });
  }

  // The same where the exponentials are what is left of them; it takes their place.
  template <typename operand_t>
  void write_gradient(const RowGradients<acc_t>& row, const KeptTile<operand_t, acc_t>& kept) const {
    write_gradient(row, kept.exponentials, [&](int64_t r) {
      const Vec shift = Vec::loadu(kept.shifts + r);
      const Vec factor = Vec::loadu(row.factor + r) * exp_bounded(shift - Vec::loadu(row.maximum + r));
      return [this, shift, factor](int64_t, const Vec& e) {
        // Where e is too small for its logarithm it does not matter: it is as good as 0.
        const Vec u = args_.softcap == 0 ? e : at::vec::clamp_min(shift + e.log(), Vec(-args_.softcap));
        return std::pair(e * factor, u);
      };
    });
  }

  // Puts the gradient at the targets of the first `count` rows, where they are in this tile.
  template <typename operand_t>
  void write_targets(
      const RowGradients<acc_t>& row, const int64_t* targets, int64_t count, Matrix<operand_t> gradient) const {
    for (int64_t r = 0; r < count; ++r) {
      if (is_here(targets[r])) {
        *gradient.at(targets[r] - first_, r).data = static_cast<operand_t>(row.target[r]);
      }
    }
  }

 private:
  bool is_here(int64_t target) const {
    return target >= first_ && target < first_ + classes_;
  }

  // `make_values(r)` gives for a vector of rows a function of a class, and of what is at the gradient's place: the
  // exponential times the factor of its row, and the logit.
  template <typename operand_t, typename MakeValues>
  void write_gradient(const RowGradients<acc_t>& row, Matrix<operand_t> gradient, const MakeValues& make_values) const {
    constexpr int parts = Pack<operand_t>::parts;
    for (int64_t r = 0; r < rows_; r += Pack<operand_t>::size) {
      const auto values = [&]<size_t... k>(std::index_sequence<k...>) {
        return std::array{make_values(r + static_cast<int64_t>(k) * Vec::size())...};
      }(std::make_index_sequence<parts>());
      for (int64_t c = 0; c < classes_; ++c) {
        operand_t* place = gradient.at(c, r).data;
        Pack<operand_t> pack = Pack<operand_t>::load(place);
        for (int k = 0; k < parts; ++k) {
          auto [value, u] = values[k](c, pack.part[k]);
          if (args_.smoothing != 0) {
            value = value - Vec::loadu(row.soft + r + k * Vec::size()) * Vec(weight(c));
          }
          if (args_.softcap != 0) {
            value = value * cap_slope(u, args_.softcap);
          }
          pack.part[k] = value;
        }
        pack.store(place);
      }
    }
  }

  Vec logit(int64_t c, int64_t r) const {
    return Vec::loadu(logits_.data + c * logits_.stride + r);
  }

  acc_t weight(int64_t c) const {
    return args_.weight == nullptr ? acc_t(1) : args_.weight[first_ + c];
  }

  const LinearCrossEntropy<scalar_t>& args_;
  const Matrix<acc_t> logits_;
  const int64_t first_, classes_, rows_;
};

}  // namespace lightkit::cpu
