// The second pass of the fused linear cross-entropy over a chunk of rows: the gradients, first of the classes whose
// exponentials were kept, then of the other classes slice by slice.
#pragma once

#include "state.h"

namespace lightkit::cpu::linear_cross_entropy {

template <typename scalar_t, typename operand_t>
class GradientPass {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  using Operand = Operands<scalar_t, operand_t>;
  // Half-precision gradients are summed in float beside their place, and rounded once.
  static constexpr bool kSumsApart = is_half<scalar_t>;

 public:
  explicit GradientPass(State<scalar_t, operand_t>& state) : state_(state), args_(state.args), plan_(state.plan) {}

  void run() {
    if (plan_.kept > 0) {
      fill_kept();
      use_gradients(0, plan_.kept, state_.kept_exponentials());
    }
    for (int64_t begin = plan_.kept; begin < args_.classes; begin += plan_.slice) {
      const int64_t end = std::min(begin + plan_.slice, args_.classes);
      fill(begin, end, state_.slice());
      use_gradients(begin, end, state_.slice());
    }
    if (kSumsApart && args_.hidden_gradient != nullptr) {
      parallel_for(0, state_.count, kConvertedRows, [&](int64_t begin, int64_t end) {
        const int64_t offset = begin * args_.features;
        at::vec::convert(
            state_.hidden_sums() + offset,
            args_.hidden_gradient + state_.first * args_.features + offset,
            (end - begin) * args_.features);
      });
    }
  }

 private:
  // Turns the kept exponentials into gradients with respect to the logits.
  void fill_kept() {
    const int64_t row_blocks = state_.row_blocks();
    state_.for_each(ceil_div(plan_.kept, kTileClasses) * row_blocks, [&](int64_t item, auto& scratch) {
      const RowBlock block = state_.row_block(item % row_blocks);
      const int64_t c = item / row_blocks * kTileClasses, classes = std::min(kTileClasses, plan_.kept - c);
      const LogitTile<scalar_t> tile(args_, {scratch.tile.data(), kTileRows}, c, classes, block.padded);
      const auto kept = state_.kept_tile(c, block.begin);
      tile.write_gradient(state_.row_gradients(block.begin), kept);
      write_targets(tile, block, kept.exponentials);
    });
  }

  // Computes the logits of the classes [begin, end) again, and writes their gradients to `slice` [end - begin, rows].
  void fill(int64_t begin, int64_t end, Matrix<operand_t> slice) {
    const int64_t row_blocks = state_.row_blocks();
    state_.for_each(ceil_div(end - begin, kSumClasses) * row_blocks, [&](int64_t item, auto& scratch) {
      const RowBlock block = state_.row_block(item % row_blocks);
      const auto panel = state_.transposed_hidden(block, scratch);
      const int64_t first = begin + item / row_blocks * kSumClasses;
      const int64_t last = std::min(first + kSumClasses, end);
      for (int64_t c = first; c < last; c += kTileClasses) {
        const auto tile = state_.compute_logits(block, c, std::min(kTileClasses, last - c), panel, scratch);
        const Matrix<operand_t> out = slice.at(c - begin, block.begin);
        tile.write_gradient(state_.row_gradients(block.begin), out);
        write_targets(tile, block, out);
      }
    });
  }

  void write_targets(const LogitTile<scalar_t>& tile, const RowBlock& block, Matrix<operand_t> gradient) {
    tile.write_targets(state_.row_gradients(block.begin), state_.targets(block.begin), block.count, gradient);
  }

  // Computes the parts of all gradients that come from the logits of the classes [begin, end).
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

  // Halves `most` while threads would be idle: each part of `total` is combined with `others` parts of another
  // dimension.
  int64_t part_size(int64_t total, int64_t most, int64_t least, int64_t others) const {
    int64_t size = most;
    while (size > least && ceil_div(total, size) * others < kPartsPerThread * state_.threads) {
      size /= 2;
    }
    return size;
  }

  // weight_gradient [classes, features] = gradient [classes, rows] x hidden [rows, features]
  void write_weight_gradient(int64_t begin, int64_t end, Matrix<const operand_t> gradient) {
    const int64_t columns = std::min(kMaxColumns, args_.features);
    const int64_t column_parts = ceil_div(args_.features, columns);
    const int64_t size = part_size(end - begin, kMaxWeightClasses, kTileClasses, column_parts);
    const Matrix<scalar_t> out{args_.weight_gradient, args_.features};
    state_.for_each(ceil_div(end - begin, size) * column_parts, [&](int64_t item, auto& scratch) {
      const int64_t c = begin + item / column_parts * size, classes = std::min(size, end - c);
      const int64_t d = item % column_parts * columns, width = std::min(columns, args_.features - d);
      // A gradient of the accumulation type is summed in its place, where the sum of the earlier chunks is.
      Matrix<acc_t> sum{scratch.tile.data(), width};
      if constexpr (!kSumsApart) {
        sum = out.at(c, d);
      }
      const auto multiply = [&](int64_t r, int64_t terms, Matrix<acc_t> to, bool accumulate) {
        const auto left = gradient.at(c - begin, r);
        const auto right = Operand::right(state_.hidden(r, d), terms, width, scratch.right.data());
        tile_gemm(
            classes,
            width,
            paired_terms(terms),
            left.data,
            left.stride,
            right.data,
            right.stride,
            to.data,
            to.stride,
            accumulate);
      };
      state_.add_terms(classes, width, state_.count, kGemmTerms, sum, state_.first > 0, scratch, multiply);
      if constexpr (kSumsApart) {
        convert(Matrix<const acc_t>{sum.data, sum.stride}, classes, width, out.at(c, d));
      }
    });
  }

  // Where operands are pairs of terms, an odd last term is paired with a 0, in `gradient` and in the other operand.
  static int64_t paired_terms(int64_t terms) {
    return Operand::paired ? round_up(terms, 2) : terms;
  }

  // bias_gradient [classes] = the sum of gradient [classes, rows] over the rows
  void write_bias_gradient(int64_t begin, int64_t end, Matrix<const operand_t> gradient) {
    parallel_for(begin, end, kTileClasses, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const operand_t* values = gradient.at(c - begin, 0).data;
        Vec lanes(acc_t(0));
        for (int64_t r = 0; r < state_.padded; r += Pack<operand_t>::size) {
          for (const Vec& part : Pack<operand_t>::load(values + r).part) {
            lanes = lanes + part;
          }
        }
        const acc_t sum = horizontal_sum(lanes);
        args_.bias_gradient[c] = state_.first == 0 ? sum : args_.bias_gradient[c] + sum;
      }
    });
  }

  // hidden_gradient [rows, features] += gradient^T [rows, classes] x weights [classes, features]
  void add_to_hidden_gradient(int64_t begin, int64_t end, Matrix<const operand_t> gradient) {
    const int64_t size = part_size(state_.count, kMaxHiddenRows, kTileRows, 1);
    const int64_t row_parts = ceil_div(state_.count, size);
    const int64_t columns = part_size(args_.features, kMaxColumns, kMinColumns, row_parts);
    const int64_t column_parts = ceil_div(args_.features, columns);
    Matrix<acc_t> sums{state_.hidden_sums(), args_.features};
    if constexpr (!kSumsApart) {
      sums.data = args_.hidden_gradient + state_.first * args_.features;
    }
    state_.for_each(row_parts * column_parts, [&](int64_t item, auto& scratch) {
      const int64_t r = item / column_parts * size, rows = std::min(size, state_.count - r);
      const int64_t d = item % column_parts * columns, width = std::min(columns, args_.features - d);
      const Matrix<acc_t> out = sums.at(r, d);
      const auto multiply = [&](int64_t term, int64_t terms, Matrix<acc_t> to, bool accumulate) {
        const int64_t c = begin + term, even = paired_terms(terms);
        const Matrix<operand_t> left{scratch.left.data(), kGemmTerms};
        transpose(gradient.at(term, r), terms, rows, left);
        if (even > terms) {
          for (int64_t i = 0; i < rows; ++i) {
            *left.at(i, terms).data = operand_t(0);
          }
        }
        const auto right = Operand::right(state_.weights(c, d), terms, width, scratch.right.data());
        tile_gemm(rows, width, even, left.data, left.stride, right.data, right.stride, to.data, to.stride, accumulate);
      };
      state_.add_terms(rows, width, end - begin, kGemmTerms, out, begin > 0, scratch, multiply);
    });
  }

  State<scalar_t, operand_t>& state_;
  const Problem<scalar_t>& args_;
  const MemoryPlan plan_;
};

}  // namespace lightkit::cpu::linear_cross_entropy
