// The arithmetic of cross-entropy on a tile of logits [classes, rows]. A row is a lane of a vector, so that sums over
// classes need no sums within a vector.
#pragma once

#include "../common/softcap.h"
#include "linear_cross_entropy.h"
#include "operands.h"
#include "tuning.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace lightkit::cpu::linear_cross_entropy {

// The sums of some rows over the classes so far. Rows that pad the last vector have sums, too.
template <typename acc_t>
struct RowSums {
  acc_t* maximum;  // [rows]
  acc_t* sum;      // [rows]: sum_c exp(u_c - maximum)
  acc_t* soft;     // [rows]: sum_c weight_c u_c, for label smoothing

  static constexpr int64_t kFields = 3;

  void reset(int64_t rows) const {
    // The lowest finite number: with -inf, -inf - -inf would make NaN of classes that a bias rules out.
    std::fill_n(maximum, rows, std::numeric_limits<acc_t>::lowest());
    std::fill_n(sum, rows, acc_t(0));
    std::fill_n(soft, rows, acc_t(0));
  }
};

// The parts of the gradient with respect to the logits of a row:
//   (factor exp(u - maximum) - soft weight_c) du/dz, and `target` at the target.
template <typename acc_t>
struct RowGradients {
  acc_t* maximum;  // [rows]
  acc_t* factor;   // [rows]
  acc_t* soft;     // [rows]
  acc_t* target;   // [rows]

  static constexpr int64_t kFields = 4;
};

// The part of a tile that is kept until the sums of its rows are complete.
template <typename operand_t, typename acc_t>
struct KeptTile {
  Matrix<operand_t> exponentials;  // [classes, rows]: exp(u - shift)
  acc_t* shifts;                   // [rows]
};

template <typename scalar_t>
class LogitTile {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;

  // `logits` [classes, rows] are of the classes from `first` on; `rows` is a multiple of kRowMultiple.
  LogitTile(const Problem<scalar_t>& args, Matrix<acc_t> logits, int64_t first, int64_t classes, int64_t rows)
      : args_(args), logits_(logits), first_(first), classes_(classes), rows_(rows) {}

  // Adds the bias to products, and applies the softcap.
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

  // Adds the tile to the sums of its rows. Unless `kept` is null, it gets exp(u - shift) and the shifts of this tile.
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
          // The maximum may lose a NaN; the sum keeps it.
          maximum[k] = at::vec::clamp_min(logit(c, r + k * Vec::size()), maximum[k]);
        }
      }
      std::array<std::array<Vec, parts>, kSumChains> chains;
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
      for (; c + kSumChains <= classes_; c += kSumChains) {
        for (int i = 0; i < kSumChains; ++i) {
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
      // The tile is summed first: long chains of additions lose digits.
      Vec soft(acc_t(0));
      for (int64_t c = 0; c < classes_; ++c) {
        soft = at::vec::fmadd(Vec(weight(c)), logit(c, r), soft);
      }
      (Vec::loadu(sums.soft + r) + soft).store(sums.soft + r);
    }
  }

  // Writes the logits at the targets of the first `count` rows, if they are in this tile.
  void pick_targets(const int64_t* targets, int64_t count, acc_t* target_logits) const {
    for (int64_t r = 0; r < count; ++r) {
      if (is_here(targets[r])) {
        target_logits[r] = *logits_.at(targets[r] - first_, r).data;
      }
    }
  }

  // Writes the gradient [classes, rows] with respect to the logits, computed from the logits.
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

  // Replaces the kept exponentials by the gradient with respect to the logits.
  template <typename operand_t>
  void write_gradient(const RowGradients<acc_t>& row, const KeptTile<operand_t, acc_t>& kept) const {
    write_gradient(row, kept.exponentials, [&](int64_t r) {
      const Vec shift = Vec::loadu(kept.shifts + r);
      const Vec factor = Vec::loadu(row.factor + r) * exp_bounded(shift - Vec::loadu(row.maximum + r));
      return [this, shift, factor](int64_t, const Vec& e) {
        // An e that is too small for its logarithm has a gradient of nearly 0.
        const Vec u = args_.softcap == 0 ? e : at::vec::clamp_min(shift + e.log(), Vec(-args_.softcap));
        return std::pair(e * factor, u);
      };
    });
  }

  // Writes the gradients at the targets of the first `count` rows, if they are in this tile.
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

  // make_values(r) returns, for the vector of rows at `r`, a function of a class and of the old value in the gradient's
  // place. That function returns the exponential times the row's factor, and the logit.
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

  const Problem<scalar_t>& args_;
  const Matrix<acc_t> logits_;
  const int64_t first_, classes_, rows_;
};

}  // namespace lightkit::cpu::linear_cross_entropy
