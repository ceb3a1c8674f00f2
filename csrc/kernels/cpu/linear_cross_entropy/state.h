// The state of one call of the fused linear cross-entropy: its memory, its chunk of rows, and products of tiles.
#pragma once

#include "../common/aligned_buffer.h"
#include "../common/parallel.h"
#include "linear_cross_entropy.h"
#include "logit_tile.h"
#include "memory_plan.h"
#include "operands.h"
#include "tile_gemm.h"
#include "tuning.h"

#include <algorithm>
#include <vector>

namespace lightkit::cpu::linear_cross_entropy {

// Rows are worked on in chunks, and the rows of a chunk in blocks of kTileRows.
struct RowBlock {
  int64_t begin;  // in the chunk
  int64_t count;
  int64_t padded;
};

// The scratch of one thread.
template <typename scalar_t, typename operand_t>
struct Scratch {
  using acc_t = accumulator_t<scalar_t>;

  Scratch(int64_t features, int64_t panel_rows)
      : panel(features * panel_rows),
        left(std::max(kTileClasses * kChainTerms<operand_t>, kMaxHiddenRows * kGemmTerms)),
        right((kGemmTerms + 1) * kMaxColumns),
        tile(is_half<scalar_t> ? kMaxWeightClasses * kMaxColumns : kTileClasses * kTileRows),
        chain(std::max(kMaxWeightClasses, kMaxHiddenRows) * kMaxColumns) {}

  AlignedBuffer<operand_t> panel;  // [features, rows]: the hidden states of a row block, transposed
  AlignedBuffer<operand_t> left;   // the left operand of a product
  AlignedBuffer<operand_t> right;  // the right operand of a product
  AlignedBuffer<acc_t> tile;       // a tile of logits, or a block of the gradient of the weight
  AlignedBuffer<acc_t> chain;      // the sum of a chain of terms
};

template <typename scalar_t, typename operand_t>
class State {
 public:
  using acc_t = accumulator_t<scalar_t>;
  using Operand = Operands<scalar_t, operand_t>;
  using ThreadScratch = Scratch<scalar_t, operand_t>;

  const Problem<scalar_t>& args;
  const MemoryPlan plan;
  const int64_t threads;
  // The rows of the chunk, and how many they are with the padding of the last vector.
  int64_t first = 0, count = 0, padded = 0;

  State(const Problem<scalar_t>& args, const MemoryPlan& plan)
      : args(args),
        plan(plan),
        threads(at::get_num_threads()),
        blocks_(ceil_div(args.classes, kSumClasses)),
        sums_(args.losses == nullptr ? 0 : blocks_ * plan.stride * RowSums<acc_t>::kFields),
        rows_(plan.stride * (RowGradients<acc_t>::kFields + 1)),
        shifts_(ceil_div(plan.kept, kTileClasses) * plan.stride) {
    scratch_.reserve(threads);
    for (int64_t t = 0; t < threads; ++t) {
      scratch_.emplace_back(args.features, std::min(kTileRows, plan.stride));
    }
  }

  // Turns to the chunk that begins with row `row`.
  void set_chunk(int64_t row) {
    first = row;
    count = std::min(plan.chunk, args.rows - row);
    padded = round_up(count, kRowMultiple);
  }

  // Runs work(item, scratch) for every item, each on one thread.
  template <typename Work>
  void for_each(int64_t items, const Work& work) {
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      ThreadScratch& scratch = scratch_[at::get_thread_num()];
      for (int64_t item = begin; item < end; ++item) {
        work(item, scratch);
      }
      end_tile_gemm();
    });
  }

  int64_t row_blocks() const {
    return ceil_div(count, kTileRows);
  }

  RowBlock row_block(int64_t index) const {
    const int64_t begin = index * kTileRows;
    return {begin, std::min(kTileRows, count - begin), std::min(kTileRows, padded - begin)};
  }

  // Blocks of kSumClasses classes.
  int64_t class_blocks() const {
    return blocks_;
  }

  // The sums of the rows from `row` on over one block of classes.
  RowSums<acc_t> sums(int64_t block, int64_t row) {
    acc_t* data = sums_.data() + block * RowSums<acc_t>::kFields * plan.stride + row;
    return {data, data + plan.stride, data + 2 * plan.stride};
  }

  RowGradients<acc_t> row_gradients(int64_t row) {
    acc_t* data = rows_.data() + row;
    return {data, data + plan.stride, data + 2 * plan.stride, data + 3 * plan.stride};
  }

  // The logit of each row's target, [rows of the chunk].
  acc_t* target_logits() {
    return rows_.data() + RowGradients<acc_t>::kFields * plan.stride;
  }

  const int64_t* targets(int64_t row) const {
    return args.target + first + row;
  }

  Matrix<const scalar_t> hidden(int64_t row, int64_t feature = 0) const {
    return Matrix<const scalar_t>{args.hidden, args.features}.at(first + row, feature);
  }

  Matrix<const scalar_t> weights(int64_t c, int64_t feature = 0) const {
    return Matrix<const scalar_t>{args.linear_weight, args.features}.at(c, feature);
  }

  // [kept, stride]
  Matrix<operand_t> kept_exponentials() const {
    return {reinterpret_cast<operand_t*>(args.workspace), plan.stride};
  }

  // [slice, stride]
  Matrix<operand_t> slice() const {
    return {reinterpret_cast<operand_t*>(args.workspace + plan.kept_bytes), plan.stride};
  }

  // [rows, features]
  acc_t* hidden_sums() const {
    return reinterpret_cast<acc_t*>(args.workspace + plan.kept_bytes + plan.slice_bytes);
  }

  KeptTile<operand_t, acc_t> kept_tile(int64_t c, int64_t row) {
    return {kept_exponentials().at(c, row), shifts_.data() + c / kTileClasses * plan.stride + row};
  }

  // [features, rows]
  Matrix<const operand_t> transposed_hidden(const RowBlock& block, ThreadScratch& scratch) const {
    return Operand::right_transposed(
        hidden(block.begin), block.count, args.features, block.padded, scratch.panel.data());
  }

  // Computes `out` [m, n] = or += a product of `total` terms. multiply(term, terms, to, accumulate) does `terms` of
  // them, at most `step`.
  template <typename Multiply>
  void add_terms(
      int64_t m,
      int64_t n,
      int64_t total,
      int64_t step,
      Matrix<acc_t> out,
      bool accumulate,
      ThreadScratch& scratch,
      const Multiply& multiply) const {
    for (int64_t begin = 0; begin < total; begin += kChainTerms<operand_t>) {
      const int64_t end = std::min(begin + kChainTerms<operand_t>, total);
      const bool direct = begin == 0 && !accumulate;
      const Matrix<acc_t> to = direct ? out : Matrix<acc_t>{scratch.chain.data(), n};
      for (int64_t term = begin; term < end; term += step) {
        multiply(term, std::min(step, end - term), to, term > begin);
      }
      for (int64_t i = 0; !direct && i < m; ++i) {
        acc_t* sum = out.at(i, 0).data;
        const acc_t* chain = to.at(i, 0).data;
        for (int64_t j = 0; j < n; ++j) {
          sum[j] += chain[j];
        }
      }
    }
  }

  // Computes the logits of `classes` classes from `c` on, [classes, rows of the block], in the scratch.
  LogitTile<scalar_t> compute_logits(
      const RowBlock& block,
      int64_t c,
      int64_t classes,
      Matrix<const operand_t> panel,  // [features, rows of the block]
      ThreadScratch& scratch) const {
    const Matrix<acc_t> out{scratch.tile.data(), kTileRows};
    const auto multiply = [&](int64_t d, int64_t terms, Matrix<acc_t> to, bool accumulate) {
      const auto left = Operand::left(weights(c, d), classes, terms, scratch.left.data());
      // A pair of features is one row of the panel, twice as long.
      const operand_t* right = panel.data + d * panel.stride;
      tile_gemm(
          classes, block.padded, terms, left.data, left.stride, right, panel.stride, to.data, to.stride, accumulate);
    };
    add_terms(classes, block.padded, args.features, kChainTerms<operand_t>, out, false, scratch, multiply);
    const LogitTile<scalar_t> tile(args, out, c, classes, block.padded);
    tile.finish_logits();
    return tile;
  }

 private:
  const int64_t blocks_;
  AlignedBuffer<acc_t> sums_;    // [class blocks, fields of RowSums, stride]
  AlignedBuffer<acc_t> rows_;    // [fields of RowGradients and the target's logit, stride]
  AlignedBuffer<acc_t> shifts_;  // [tiles of the kept classes, stride]
  std::vector<ThreadScratch> scratch_;
};

}  // namespace lightkit::cpu::linear_cross_entropy
