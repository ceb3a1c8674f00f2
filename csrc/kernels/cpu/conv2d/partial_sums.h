// The gradient of a weight, summed in parts: each thread sums some parts, which are then added in a fixed order.
#pragma once

#include "../common/aligned_buffer.h"
#include "../common/pieces.h"
#include "kernels.h"
#include "register_tile.h"

#include <functional>

namespace lightkit::cpu::conv2d {

// Returns the number of parts, which depends on the problem alone.
inline int64_t count_parts(int64_t positions, int64_t items) {
  return std::clamp<int64_t>(positions / kPartPositions, 1, std::min(kMaxParts, items));
}

// Adds the parts, and writes the sums: row k and output channel o go to `to[o * stride + place(k)]`.
template <typename T>
void add_parts(
    const T* parts,  // [count, rows, lanes], parts `part_rows` rows apart
    int64_t count,
    int64_t rows,
    int64_t part_rows,
    int64_t lanes,  // whole vectors
    int64_t channels,
    T* to,
    int64_t stride,
    const std::function<int64_t(int64_t)>& place) {
  constexpr int width = kWidth<T>;
  // A piece is as many rows as fill a vector.
  in_pieces(rows, width, kPackingMacs * count * rows * lanes / width, [&](int64_t begin, int64_t end) {
    alignas(64) T sums[width];
    for (int64_t lane = 0; lane < lanes; lane += width) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = parts + row * lanes + lane;
        Vec<T> sum = Vec<T>::loadu(from);
        for (int64_t p = 1; p < count; ++p) {
          sum = sum + Vec<T>::loadu(from + p * part_rows * lanes);
        }
        sum.store(sums);
        T* const column = to + place(row);
        for (int64_t o = lane; o < std::min<int64_t>(channels, lane + width); ++o) {
          column[o * stride] = sums[o - lane];
        }
      }
    }
  });
}

// The sums of all parts: `rows` rows for each output channel's weights, and one of the bias.
template <typename T>
class PartialSums {
 public:
  // The items of work, such as bands of images, are divided among the parts.
  PartialSums(const GradWeightProblem<T>& problem, int64_t rows, int64_t items)
      : p_(problem),
        rows_(rows),
        items_(items),
        lanes_(round_up(problem.correlation.out_channels, kWidth<T>)),
        parts_(count_parts(problem.correlation.images * problem.correlation.rows * problem.correlation.columns, items)),
        sums_(parts_ * part_size()) {}

  // Whole vectors of output channels.
  int64_t lanes() const {
    return lanes_;
  }

  // Calls add_part(scratch, begin, end, sums, bias) for each part, with its items and its sums, which are 0 before:
  // [rows, lanes] and [lanes]. Then it writes the gradients: row k goes to the place place(k) of a channel's weights.
  template <typename MakeScratch, typename AddPart>
  void run(
      int64_t macs,
      const MakeScratch& make_scratch,
      const AddPart& add_part,
      int64_t weights,  // of an output channel
      const std::function<int64_t(int64_t)>& place) {
    in_pieces(parts_, 1, macs, make_scratch, [&](auto& scratch, int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        T* const sums = sums_.data() + part * part_size();
        std::fill_n(sums, part_size(), T(0));
        add_part(scratch, part * items_ / parts_, (part + 1) * items_ / parts_, sums, sums + rows_ * lanes_);
      }
    });
    const Correlation& c = p_.correlation;
    if (p_.grad_weight != nullptr) {
      add_parts<T>(sums_.data(), parts_, rows_, rows_ + 1, lanes_, c.out_channels, p_.grad_weight, weights, place);
    }
    if (p_.grad_bias != nullptr) {
      const T* const bias = sums_.data() + rows_ * lanes_;
      add_parts<T>(
          bias, parts_, 1, rows_ + 1, lanes_, c.out_channels, p_.grad_bias, 1, [](int64_t) { return int64_t(0); });
    }
  }

 private:
  int64_t part_size() const {
    return (rows_ + 1) * lanes_;
  }

  const GradWeightProblem<T>& p_;
  const int64_t rows_;
  const int64_t items_;
  const int64_t lanes_;
  const int64_t parts_;
  AlignedBuffer<T> sums_;  // [parts, rows and one of the bias, lanes]
};

}  // namespace lightkit::cpu::conv2d
