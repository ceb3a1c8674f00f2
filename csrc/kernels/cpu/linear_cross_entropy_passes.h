// The passes of the fused linear cross-entropy over the tiles of its logits.
#pragma once

#include "linear_cross_entropy.h"
#include "linear_cross_entropy_plan.h"
#include "linear_cross_entropy_tile.h"
#include "operands.h"
#include "parallel.h"
#include "tile_gemm.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace lightkit::cpu {

// Of a product with many terms a call of tile_gemm adds so many: its operands stay in the second-level cache.
constexpr int64_t kTerms = 128;

// Sums of so many terms are added to those before: one long chain of additions would lose digits. Half precision has
// fewer to lose.
template <typename operand_t>
constexpr int64_t kChain = is_half<operand_t> ? 1024 : 256;

// Rows of the hidden gradient that are worked on at a time; fewer where threads would be idle.
constexpr int64_t kMostRows = 256;

// Classes, and columns, of the weight gradient that are worked on at a time; fewer where threads would be idle.
constexpr int64_t kMostClasses = 256;
constexpr int64_t kMostColumns = 512;
constexpr int64_t kLeastColumns = 64;

// Uninitialised memory.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(c10::GetCPUAllocator()->allocate(count * sizeof(T))) {}
  T* data() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  at::DataPtr memory_;
};

// One call: the passes over its chunks of rows.
template <typename scalar_t, typename operand_t>
class Passes {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  using Operand = Operands<scalar_t, operand_t>;
  static constexpr bool kSumsApart = is_half<scalar_t>;

  // What a thread works with.
  struct Scratch {
    Scratch(int64_t features, int64_t panel_rows)
        : panel(features * panel_rows),
          left(std::max(kTileClasses * kChain<operand_t>, kMostRows * kTerms)),
          right((kTerms + 1) * kMostColumns),
          tile(kSumsApart ? kMostClasses * kMostColumns : kTileClasses * kTileRows),
          chain(std::max(kMostClasses, kMostRows) * kMostColumns) {}
    Buffer<operand_t> panel;  // the hidden states of some rows, transposed
    Buffer<operand_t> left;
    Buffer<operand_t> right;
    Buffer<acc_t> tile;
    Buffer<acc_t> chain;
  };

 public:
  Passes(const LinearCrossEntropy<scalar_t>& args, const Plan& plan)
      : args_(args),
        plan_(plan),
        kept_(reinterpret_cast<operand_t*>(args.workspace)),
        slice_(reinterpret_cast<operand_t*>(args.workspace + plan.kept_bytes)),
        hidden_sums_(reinterpret_cast<acc_t*>(args.workspace + plan.kept_bytes + plan.slice_bytes)),
        blocks_(ceil_div(args.classes, kSumClasses)),
        sums_(args.losses == nullptr ? 0 : blocks_ * plan.stride * RowSums<acc_t>::kFields),
        rows_(plan.stride * (RowGradients<acc_t>::kFields + 1)),
        shifts_(ceil_div(plan.kept, kTileClasses) * plan.stride),
        threads_(at::get_num_threads()) {
    if (args.smoothing != 0) {
      double sum = 0;
      for (int64_t c = 0; c < args.classes; ++c) {
        sum += args.weight == nullptr ? 1 : args.weight[c];
      }
      weight_sum_ = static_cast<acc_t>(sum);
    }
    scratch_.reserve(threads_);
    for (int64_t t = 0; t < threads_; ++t) {
      scratch_.emplace_back(args.features, std::min(kTileRows, plan.stride));
    }
  }

  void run() {
    for (first_ = 0; first_ < args_.rows; first_ += plan_.chunk) {
      count_ = std::min(plan_.chunk, args_.rows - first_);
      padded_ = round_up(count_, kRowMultiple);
      if (args_.losses != nullptr) {
        sum_exponentials();
      }
      finish_rows();
      if (args_.gradient_scale != nullptr) {
        write_gradients();
      }
    }
  }

 private:
  // Runs `work(unit, scratch)` for every unit, each on one thread.
  template <typename Work>
  void for_each(int64_t units, const Work& work) {
    parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_[at::get_thread_num()];
      for (int64_t unit = begin; unit < end; ++unit) {
        work(unit, scratch);
      }
      end_tile_gemm();
    });
  }

  // Rows of the chunk are worked on in blocks of kTileRows.
  int64_t row_blocks() const {
    return ceil_div(count_, kTileRows);
  }

  struct RowBlock {
    int64_t begin;   // in the chunk
    int64_t count;
    int64_t padded;
  };

  RowBlock row_block(int64_t index) const {
    const int64_t begin = index * kTileRows;
    return {begin, std::min(kTileRows, count_ - begin), std::min(kTileRows, padded_ - begin)};
  }

  RowSums<acc_t> sums(int64_t block, int64_t row) const {
    acc_t* data = sums_.data() + block * RowSums<acc_t>::kFields * plan_.stride + row;
    return {data, data + plan_.stride, data + 2 * plan_.stride};
  }

  RowGradients<acc_t> row_gradients(int64_t row) const {
    acc_t* data = rows_.data() + row;
    return {data, data + plan_.stride, data + 2 * plan_.stride, data + 3 * plan_.stride};
  }

  // Of each row, the logit of its target; for the losses.
  acc_t* target_logits() const {
    return rows_.data() + RowGradients<acc_t>::kFields * plan_.stride;
  }

  const int64_t* targets(int64_t row) const {
    return args_.target + first_ + row;
  }

  Matrix<const scalar_t> hidden(int64_t row, int64_t feature = 0) const {
    return Matrix<const scalar_t>{args_.hidden, args_.features}.at(first_ + row, feature);
  }

  Matrix<const scalar_t> weights(int64_t c, int64_t feature = 0) const {
    return Matrix<const scalar_t>{args_.linear_weight, args_.features}.at(c, feature);
  }

  Matrix<const operand_t> transposed_hidden(const RowBlock& block, Scratch& scratch) const {
    return Operand::right_transposed(
        hidden(block.begin), block.count, args_.features, block.padded, scratch.panel.data());
  }

  // out (m, n) = or += a product of `total` terms. `multiply(term, terms, place, accumulate)` does `terms` of them, at
  // most `step`.
  template <typename Multiply>
  void add_terms(
      int64_t m, int64_t n, int64_t total, int64_t step, Matrix<acc_t> out, bool accumulate, Scratch& scratch,
      const Multiply& multiply) const {
    for (int64_t begin = 0; begin < total; begin += kChain<operand_t>) {
      const int64_t end = std::min(begin + kChain<operand_t>, total);
      const bool direct = begin == 0 && !accumulate;
      const Matrix<acc_t> place = direct ? out : Matrix<acc_t>{scratch.chain.data(), n};
      for (int64_t term = begin; term < end; term += step) {
        multiply(term, std::min(step, end - term), place, term > begin);
      }
      for (int64_t i = 0; !direct && i < m; ++i) {
        acc_t* to = out.at(i, 0).data;
        const acc_t* from = place.at(i, 0).data;
        for (int64_t j = 0; j < n; ++j) {
          to[j] += from[j];
        }
      }
    }
  }

  // The logits of a tile of classes, in the scratch.
  LogitTile<scalar_t> compute_logits(
      const RowBlock& block, int64_t c, int64_t classes, Matrix<const operand_t> panel, Scratch& scratch) const {
    const Matrix<acc_t> out{scratch.tile.data(), kTileRows};
    const auto multiply = [&](int64_t d, int64_t terms, Matrix<acc_t> place, bool accumulate) {
      const auto left = Operand::left(weights(c, d), classes, terms, scratch.left.data());
      // Pairs of features are rows of the panel that are twice as long.
      const operand_t* right = panel.data + d * panel.stride;
      tile_gemm(
          classes, block.padded, terms, left.data, left.stride, right, panel.stride, place.data, place.stride,
          accumulate);
    };
    add_terms(classes, block.padded, args_.features, kChain<operand_t>, out, false, scratch, multiply);
    const LogitTile<scalar_t> tile(args_, out, c, classes, block.padded);
    tile.finish_logits();
    return tile;
  }

  KeptTile<operand_t, acc_t> kept(int64_t c, int64_t row) const {
    return {
        Matrix<operand_t>{kept_, plan_.stride}.at(c, row),
        shifts_.data() + c / kTileClasses * plan_.stride + row};
  }

  // First pass: what the loss of every row needs of its logits.
  void sum_exponentials() {
    const int64_t row_blocks = this->row_blocks();
    // Neighbouring units share the weights.
    for_each(blocks_ * row_blocks, [&](int64_t unit, Scratch& scratch) {
      const int64_t b = unit / row_blocks;
      const RowBlock block = row_block(unit % row_blocks);
      const auto panel = transposed_hidden(block, scratch);
      const RowSums<acc_t> sums = this->sums(b, block.begin);
      sums.reset(block.padded);
      const int64_t end = std::min((b + 1) * kSumClasses, args_.classes);
      for (int64_t c = b * kSumClasses; c < end; c += kTileClasses) {
        const auto tile = compute_logits(block, c, std::min(kTileClasses, end - c), panel, scratch);
        const auto kept = c < plan_.kept ? std::optional(this->kept(c, block.begin)) : std::nullopt;
        tile.add_to(sums, kept ? &*kept : nullptr);
        tile.pick_targets(targets(block.begin), block.count, target_logits() + block.begin);
      }
    });
  }

  // Losses of the rows, and what their gradients consist of. See cross_entropy.h for the formulas.
  void finish_rows() {
    const RowGradients<acc_t> out = row_gradients(0);
    const RowStatistics<acc_t>& known = args_.rows_known;
    const acc_t share = args_.smoothing / static_cast<acc_t>(args_.classes);
    const acc_t soft = share * weight_sum_;
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t row = first_ + r;
      const acc_t target_weight = args_.weight == nullptr ? acc_t(1) : args_.weight[args_.target[row]];
      const acc_t hard = (1 - args_.smoothing) * target_weight;
      if (args_.losses != nullptr) {
        finish_loss(r, hard, soft, share);
      }
      if (args_.gradient_scale == nullptr) {
        continue;
      }
      const acc_t log_p = known.target_log_p[row], lse = known.maximum[row] + known.log_sum[row];
      const acc_t scale = args_.gradient_scale[row];
      const acc_t rest = soft + 2 * args_.z_loss * lse;
      out.maximum[r] = known.maximum[row];
      out.factor[r] = scale * (hard + rest) * std::exp(-known.log_sum[row]);
      out.soft[r] = scale * share;
      // p - 1 as expm1(log p), so that a confident row keeps its relative accuracy; rounded once.
      out.target[r] = scale * ((hard + rest) * std::expm1(log_p) + (rest - share * target_weight));
      if (args_.softcap != 0) {
        out.target[r] *= cap_slope(log_p + lse, args_.softcap);
      }
    }
    for (int64_t r = count_; r < padded_; ++r) {
      // Nothing comes of the rows that fill up the last vector.
      out.maximum[r] = std::numeric_limits<acc_t>::max();
      out.factor[r] = out.soft[r] = 0;
    }
  }

  void finish_loss(int64_t r, acc_t hard, acc_t soft, acc_t share) {
    acc_t maximum = std::numeric_limits<acc_t>::lowest();
    for (int64_t b = 0; b < blocks_; ++b) {
      maximum = std::max(maximum, *sums(b, r).maximum);
    }
    double sum = 0, soft_logits = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const RowSums<acc_t> part = sums(b, r);
      sum += static_cast<double>(*part.sum) * std::exp(static_cast<double>(*part.maximum) - maximum);
      soft_logits += *part.soft;
    }
    // 0 only where every logit is -inf, whose softmax is NaN.
    const auto log_sum = static_cast<acc_t>(sum > 0 ? std::log(sum) : std::numeric_limits<double>::quiet_NaN());
    // log(sum) + (max - u): the large parts cancel exactly.
    const acc_t negative_log_p = log_sum + (maximum - target_logits()[r]);
    acc_t loss = hard * negative_log_p;
    if (args_.smoothing != 0) {
      loss += static_cast<acc_t>(soft * (static_cast<double>(log_sum) + maximum) - share * soft_logits);
    }
    if (args_.z_loss != 0) {
      loss += args_.z_loss * (log_sum + maximum) * (log_sum + maximum);
    }
    args_.losses[first_ + r] = loss;
    args_.rows_known.maximum[first_ + r] = maximum;
    args_.rows_known.log_sum[first_ + r] = log_sum;
    args_.rows_known.target_log_p[first_ + r] = -negative_log_p;
  }

  // Second pass: the gradients, of the classes that were kept and then slice by slice of the others.
  void write_gradients() {
    if (plan_.kept > 0) {
      const Matrix<operand_t> kept{kept_, plan_.stride};
      fill_kept();
      use_gradients(0, plan_.kept, kept);
    }
    for (int64_t begin = plan_.kept; begin < args_.classes; begin += plan_.slice) {
      const int64_t end = std::min(begin + plan_.slice, args_.classes);
      const Matrix<operand_t> slice{slice_, plan_.stride};
      fill(begin, end, slice);
      use_gradients(begin, end, slice);
    }
    if (kSumsApart && args_.hidden_gradient != nullptr) {
      parallel_for(0, count_, 16, [&](int64_t begin, int64_t end) {
        const int64_t place = begin * args_.features;
        at::vec::convert(
            hidden_sums_ + place,
            args_.hidden_gradient + first_ * args_.features + place,
            (end - begin) * args_.features);
      });
    }
  }

  // Turns the exponentials that were kept into gradients with respect to the logits.
  void fill_kept() {
    const int64_t row_blocks = this->row_blocks();
    for_each(ceil_div(plan_.kept, kTileClasses) * row_blocks, [&](int64_t unit, Scratch& scratch) {
      const RowBlock block = row_block(unit % row_blocks);
      const int64_t c = unit / row_blocks * kTileClasses, classes = std::min(kTileClasses, plan_.kept - c);
      const LogitTile<scalar_t> tile(args_, {scratch.tile.data(), kTileRows}, c, classes, block.padded);
      const auto kept = this->kept(c, block.begin);
      tile.write_gradient(row_gradients(block.begin), kept);
      write_targets(tile, block, kept.exponentials);
    });
  }

  // The same for classes whose logits must be computed again.
  void fill(int64_t begin, int64_t end, Matrix<operand_t> slice) {
    const int64_t row_blocks = this->row_blocks();
    for_each(ceil_div(end - begin, kSumClasses) * row_blocks, [&](int64_t unit, Scratch& scratch) {
      const RowBlock block = row_block(unit % row_blocks);
      const auto panel = transposed_hidden(block, scratch);
      const int64_t first = begin + unit / row_blocks * kSumClasses;
      const int64_t last = std::min(first + kSumClasses, end);
      for (int64_t c = first; c < last; c += kTileClasses) {
        const auto tile = compute_logits(block, c, std::min(kTileClasses, last - c), panel, scratch);
        const Matrix<operand_t> out = slice.at(c - begin, block.begin);
        tile.write_gradient(row_gradients(block.begin), out);
        write_targets(tile, block, out);
      }
    });
  }

  void write_targets(const LogitTile<scalar_t>& tile, const RowBlock& block, Matrix<operand_t> gradient) const {
    tile.write_targets(row_gradients(block.begin), targets(block.begin), block.count, gradient);
  }

  // What the gradients with respect to the logits of some classes give.
  void use_gradients(int64_t begin, int64_t end, Matrix<operand_t> filled) {
    const Matrix<const operand_t> gradient{filled.data, filled.stride};
    if (args_.weight_gradient != nullptr) {
      write_weight_gradient(begin, end, gradient);
    }
    if (args_.bias_gradient != nullptr) {
      write_bias_gradient(begin, end, gradient);
    }
    if (args_.hidden_gradient != nullptr) {
      add_to_hidden_gradient(begin, end, gradient);
    }
  }

  // A size for parts of `total` that leaves no thread idle, where there are `others` to combine each part with.
  int64_t part_size(int64_t total, int64_t most, int64_t least, int64_t others) const {
    int64_t size = most;
    while (size > least && ceil_div(total, size) * others < 2 * threads_) {
      size /= 2;
    }
    return size;
  }

  // weight_gradient (classes, features) = gradient (classes, rows) x hidden (rows, features)
  void write_weight_gradient(int64_t begin, int64_t end, Matrix<const operand_t> gradient) {
    const int64_t columns = std::min(kMostColumns, args_.features);
    const int64_t column_parts = ceil_div(args_.features, columns);
    const int64_t size = part_size(end - begin, kMostClasses, kTileClasses, column_parts);
    const Matrix<scalar_t> out{args_.weight_gradient, args_.features};
    for_each(ceil_div(end - begin, size) * column_parts, [&](int64_t unit, Scratch& scratch) {
      const int64_t c = begin + unit / column_parts * size, classes = std::min(size, end - c);
      const int64_t d = unit % column_parts * columns, width = std::min(columns, args_.features - d);
      // In the place of the gradient where it is of the right type: what earlier chunks gave is there.
      Matrix<acc_t> sum{scratch.tile.data(), width};
      if constexpr (!kSumsApart) {
        sum = out.at(c, d);
      }
      const auto multiply = [&](int64_t r, int64_t terms, Matrix<acc_t> place, bool accumulate) {
        const auto left = gradient.at(c - begin, r);
        const auto right = Operand::right(hidden(r, d), terms, width, scratch.right.data());
        tile_gemm(
            classes, width, paired_terms(terms), left.data, left.stride, right.data, right.stride, place.data,
            place.stride, accumulate);
      };
      add_terms(classes, width, count_, kTerms, sum, first_ > 0, scratch, multiply);
      if constexpr (kSumsApart) {
        convert(Matrix<const acc_t>{sum.data, sum.stride}, classes, width, out.at(c, d));
      }
    });
  }

  // Where operands are pairs of terms: an odd last one has a 0 at its side, in `gradient` and in the pairs.
  static int64_t paired_terms(int64_t terms) {
    return Operand::paired ? round_up(terms, 2) : terms;
  }

  void write_bias_gradient(int64_t begin, int64_t end, Matrix<const operand_t> gradient) {
    parallel_for(begin, end, kTileClasses, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const operand_t* values = gradient.at(c - begin, 0).data;
        Vec lanes(acc_t(0));
        for (int64_t r = 0; r < padded_; r += Pack<operand_t>::size) {
          for (const Vec& part : Pack<operand_t>::load(values + r).part) {
            lanes = lanes + part;
          }
        }
        const acc_t sum = horizontal_sum(lanes);
        args_.bias_gradient[c] = first_ == 0 ? sum : args_.bias_gradient[c] + sum;
      }
    });
  }

  // hidden_gradient (rows, features) += gradient^T (rows, classes) x weights (classes, features)
  void add_to_hidden_gradient(int64_t begin, int64_t end, Matrix<const operand_t> gradient) {
    const int64_t size = part_size(count_, kMostRows, kTileRows, 1);
    const int64_t row_parts = ceil_div(count_, size);
    const int64_t columns = part_size(args_.features, kMostColumns, kLeastColumns, row_parts);
    const int64_t column_parts = ceil_div(args_.features, columns);
    Matrix<acc_t> sums{hidden_sums_, args_.features};
    if constexpr (!kSumsApart) {
      sums.data = args_.hidden_gradient + first_ * args_.features;
    }
    for_each(row_parts * column_parts, [&](int64_t unit, Scratch& scratch) {
      const int64_t r = unit / column_parts * size, rows = std::min(size, count_ - r);
      const int64_t d = unit % column_parts * columns, width = std::min(columns, args_.features - d);
      const Matrix<acc_t> out = sums.at(r, d);
      const auto multiply = [&](int64_t term, int64_t terms, Matrix<acc_t> place, bool accumulate) {
        const int64_t c = begin + term, even = paired_terms(terms);
        const Matrix<operand_t> left{scratch.left.data(), kTerms};
        transpose(gradient.at(term, r), terms, rows, left);
        if (even > terms) {
          for (int64_t i = 0; i < rows; ++i) {
            *left.at(i, terms).data = operand_t(0);
          }
        }
        const auto right = Operand::right(weights(c, d), terms, width, scratch.right.data());
        tile_gemm(
            rows, width, even, left.data, left.stride, right.data, right.stride, place.data, place.stride, accumulate);
      };
      add_terms(rows, width, end - begin, kTerms, out, begin > 0, scratch, multiply);
    });
  }

  const LinearCrossEntropy<scalar_t>& args_;
  const Plan plan_;
  operand_t* const kept_;     // (kept, stride)
  operand_t* const slice_;    // (slice, stride)
  acc_t* const hidden_sums_;  // (rows, features)
  const int64_t blocks_;
  const Buffer<acc_t> sums_;  // (blocks, fields, stride)
  const Buffer<acc_t> rows_;    // (fields, stride)
  const Buffer<acc_t> shifts_;  // (tiles of those kept, stride)
  const int64_t threads_;
  std::vector<Scratch> scratch_;
  acc_t weight_sum_ = 0;
  int64_t first_ = 0, count_ = 0, padded_ = 0;  // the rows of the chunk
};

}  // namespace lightkit::cpu
