// Loops over groups of channels, over parts of the rows, and over tiles of rows.
#pragma once

#include "../../common/ceil_div.h"
#include "../common/aligned_buffer.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "shape.h"
#include "tuning.h"

#include <algorithm>
#include <type_traits>

namespace lightkit::cpu::norm_act {

template <typename T>
inline constexpr int kWidth = LaneTypes<T>::count;

// Consecutive channels: whole vectors, or less than one.
template <typename T, int vector_count, bool is_partial>
struct Group {
  using Values = Lanes<T>;
  using Array = Values[vector_count];
  static constexpr int vectors = vector_count;
  static constexpr bool partial = is_partial;

  int64_t channel;  // the first one
  int64_t lanes;    // in a vector

  Values load(const T* row, int vector) const {
    return load_lanes<Values>(row + channel + vector * kWidth<T>, partial ? lanes : kWidth<T>);
  }
  void store(const Values& values, T* row, int vector) const {
    store_lanes(values, row + channel + vector * kWidth<T>, partial ? lanes : kWidth<T>);
  }
  void load(const T* row, Array& values) const {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      values[v] = load(row, v);
    }
  }

  // The bytes of the vectors of a row.
  LaneBytes<T> load_bytes(const uint8_t* row, int vector) const {
    return load_lanes<LaneBytes<T>>(row + channel + vector * kWidth<T>, partial ? lanes : kWidth<T>);
  }
  void store_bytes(const LaneBytes<T>& bytes, uint8_t* row, int vector) const {
    store_lanes(bytes, row + channel + vector * kWidth<T>, partial ? lanes : kWidth<T>);
  }

  // The bits of a row, the first channel's lowest. A vector of 4 lanes may end within a byte: `store_bits` keeps the
  // bits before it.
  uint64_t load_bits(const uint8_t* row) const {
    uint64_t bits = 0;
    std::memcpy(&bits, row + channel / 8, bit_bytes());
    return kWidth<T> % 8 == 0 ? bits : bits >> channel % 8;
  }
  void store_bits(uint64_t bits, uint8_t* row) const {
    if constexpr (kWidth<T> % 8 != 0) {
      bits <<= channel % 8;
      if (channel % 8 != 0) {
        bits |= row[channel / 8];
      }
    }
    std::memcpy(row + channel / 8, &bits, bit_bytes());
  }

 private:
  int64_t bit_bytes() const {
    if constexpr (partial) {
      return ceil_div(channel % 8 + lanes, 8);
    } else {
      return ceil_div(vectors * kWidth<T>, 8);
    }
  }
};

// Calls f(group) for groups that make up all channels.
template <typename T, typename F>
void for_each_group(int64_t channels, const F& f) {
  int64_t channel = 0;
  const auto take = [&](auto vectors) {
    for (; channels - channel >= vectors * kWidth<T>; channel += vectors * kWidth<T>) {
      f(Group<T, vectors, false>{channel, kWidth<T>});
    }
  };
  if constexpr (kVectors == 4) {
    take(std::integral_constant<int, 4>());
  }
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
  if (channel < channels) {
    f(Group<T, 1, true>{channel, channels - channel});
  }
}

// Returns the rows of a tile.
template <typename T>
int64_t tile_rows(int64_t elements_per_row) {
  return std::max<int64_t>(1, kTileBytes / (elements_per_row * static_cast<int64_t>(sizeof(T))));
}

// Calls f(begin, end) for tiles of rows, on several threads.
template <typename T, typename F>
void for_each_tile(int64_t rows, int64_t elements_per_row, const F& f) {
  const int64_t tile = tile_rows<T>(elements_per_row);
  const int64_t tiles = ceil_div(rows, tile);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (tile * elements_per_row));
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      f(t * tile, std::min(rows, (t + 1) * tile));
    }
  });
}

// The rows in parts of whole blocks, whatever the number of threads.
class Parts {
 public:
  explicit Parts(int64_t rows)
      : rows_(rows), blocks_(ceil_div(rows, kBlockRows)), count_(std::min(blocks_, kMostParts)) {}

  int64_t count() const {
    return count_;
  }

  // Calls f(begin, end) for each block of rows of a part, in order.
  template <typename F>
  void for_each_block(int64_t part, const F& f) const {
    for (int64_t b = blocks_ * part / count_; b < blocks_ * (part + 1) / count_; ++b) {
      f(b * kBlockRows, std::min(rows_, (b + 1) * kBlockRows));
    }
  }

  // Calls f(part) for each part, on several threads.
  template <typename F>
  void for_each(int64_t elements_per_row, const F& f) const {
    const int64_t elements = ceil_div(rows_, count_) * elements_per_row;
    parallel_for(0, count_, std::max<int64_t>(1, kElementsPerThread / elements), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        f(part);
      }
    });
  }

 private:
  const int64_t rows_;
  const int64_t blocks_;
  const int64_t count_;
};

// Adds up one or two sums of each channel. A loop over rows calls `add` for each; the row takes turns among the chains
// of additions.
template <typename G>
class Sums {
 public:
  using Values = typename G::Values;
  static constexpr int turns = kChains / G::vectors;

  void add(int turn, int vector, const Values& first) {
    first_[turn][vector] += first;
  }
  void add(int turn, int vector, const Values& first, const Values& second) {
    add(turn, vector, first);
    second_[turn][vector] += second;
  }

  // Calls add_row(row, turn) for all rows.
  template <typename F>
  static void for_each_row(int64_t begin, int64_t end, const F& add_row) {
    int64_t row = begin;
    for (; row + turns <= end; row += turns) {
      LIGHTKIT_UNROLL
      for (int turn = 0; turn < turns; ++turn) {
        add_row(row + turn, turn);
      }
    }
    for (; row < end; ++row) {
      add_row(row, 0);
    }
  }

  Values first(int vector) const {
    return total(first_, vector);
  }
  Values second(int vector) const {
    return total(second_, vector);
  }

 private:
  using Chains = Values[turns][G::vectors];

  static Values total(const Chains& chains, int vector) {
    Values sum{};
    LIGHTKIT_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      sum += chains[turn][vector];
    }
    return sum;
  }

  Chains first_{};
  Chains second_{};
};

// Returns the rows that a group adds up in chains: so few that they stay in the cache for the next groups.
template <typename T>
int64_t chain_rows(int64_t elements_per_row) {
  return std::clamp<int64_t>(kChainBytes / (elements_per_row * static_cast<int64_t>(sizeof(T))), 1, kChainRows);
}

// One or two sums of each channel over a block of rows: sums of the sums of chains. A long chain of equal numbers, such
// as the gradients behind a mean over the image, would add up its rounding errors.
template <typename T>
class BlockSums {
 public:
  explicit BlockSums(int64_t channels) : channels_(channels), sums_(2 * channels) {
    clear();
  }

  void clear() {
    std::fill_n(sums_.data(), 2 * channels_, T(0));
  }
  template <typename G>
  void add(const G& group, const Sums<G>& chains) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < G::vectors; ++v) {
      group.store(group.load(first(), v) + chains.first(v), first(), v);
      group.store(group.load(second(), v) + chains.second(v), second(), v);
    }
  }
  // The sums of the channels. The second ones lie behind the first.
  T* first() {
    return sums_.data();
  }
  T* second() {
    return sums_.data() + channels_;
  }

 private:
  const int64_t channels_;
  AlignedBuffer<T> sums_;  // [2, channels]
};

}  // namespace lightkit::cpu::norm_act
