// The counter-based generator Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2,
// 3, SC 2011), for consecutive counters at once.
#pragma once

#include "../common/simd.h"

#include <array>
#include <cstdint>

namespace lightkit::cpu::dropout {

// A counter gives 4 draws of 32 bits. The draws of kBlockCounters consecutive counters belong to kBlock consecutive
// elements: draw w of counter i of the block belongs to element w * kBlockCounters + i. This order is the same for
// every width of the vectors, and a vector of draws belongs to consecutive elements.
inline constexpr int kBlockCounters = 16;
inline constexpr int kDraws = 4;
inline constexpr int kBlock = kDraws * kBlockCounters;
static_assert(kBlockCounters % kWords32 == 0);

class Philox {
 public:
  explicit Philox(uint64_t key) {
    for (int round = 0; round < kRounds; ++round) {
      // The upper half of a lane of a key may hold anything, because only lower halves are multiplied.
      keys_[round] = {static_cast<uint32_t>(key) + round * kWeyl0, static_cast<uint32_t>(key >> 32) + round * kWeyl1};
    }
  }

  // Returns the draws of the counters from `first` on, one vector for each of the 4 draws.
  std::array<Words32, kDraws> draw(uint64_t first) const {
    // Lane i of the vectors belongs to counter first + i. Two groups of lanes of 64 bits have the even and the odd
    // counters, so that their low halves interleave to the draws.
    Words64 even_counters{};
    for (int i = 0; i < kWords64; ++i) {
      even_counters[i] = 2 * i;
    }
    even_counters += first;
    const auto even = rounds(even_counters);
    const auto odd = rounds(even_counters + 1);
    std::array<Words32, kDraws> draws;
    for (int w = 0; w < kDraws; ++w) {
      draws[w] = reinterpret_cast<Words32>((even[w] & kLowHalf) | (odd[w] << 32));
    }
    return draws;
  }

 private:
  static constexpr int kRounds = 10;
  static constexpr uint64_t kMultiplier0 = 0xD2511F53;
  static constexpr uint64_t kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9;
  static constexpr uint32_t kWeyl1 = 0xBB67AE85;
  static constexpr uint64_t kLowHalf = 0xffffffff;

  // Returns the 4 draws of each counter, in the low halves of the lanes.
  std::array<Words64, kDraws> rounds(const Words64& counter) const {
    Words64 c0 = counter;
    Words64 c1 = counter >> 32;
    Words64 c2{};
    Words64 c3{};
    LIGHTKIT_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const Words64 product0 = multiply_low_halves(c0, Words64{} + kMultiplier0);
      const Words64 product1 = multiply_low_halves(c2, Words64{} + kMultiplier1);
      c0 = (product1 >> 32) ^ c1 ^ keys_[round][0];
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ keys_[round][1];
      c3 = product0;
    }
    return {c0, c1, c2, c3};
  }

  std::array<std::array<uint64_t, 2>, kRounds> keys_;
};

}  // namespace lightkit::cpu::dropout
