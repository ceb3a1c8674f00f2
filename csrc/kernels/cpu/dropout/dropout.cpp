#include "dropout.h"

#include "../../common/ceil_div.h"
#include "../common/parallel.h"
#include "philox.h"
#include "tuning.h"

#include <cmath>

namespace lightkit::cpu::dropout {
namespace {

// Computes the multipliers of a block.
template <typename acc_t>
class Multipliers {
 public:
  explicit Multipliers(uint64_t seed, double p)
      : generator_(seed),
        // A multiplier is 0 if its draw is at most `last_`. Without any such draw, and with every draw, p is 0 or 1 to
        // the nearest multiple of 2^-32.
        threshold_(static_cast<uint64_t>(std::nearbyint(p * 0x1p32))),
        last_(threshold_ == 0 ? 0 : static_cast<uint32_t>(threshold_ - 1)),
        scale_(threshold_ > UINT32_MAX ? acc_t(0) : static_cast<acc_t>(1 / (1 - p))),
        dropped_(threshold_ == 0 ? scale_ : acc_t(0)) {}

  void compute(int64_t block, acc_t* multipliers) const {  // [kBlock]
    for (int i = 0; i < kBlockCounters; i += kWords32) {
      const auto draws = generator_.draw(static_cast<uint64_t>(block) * kBlockCounters + i);
      for (int w = 0; w < kDraws; ++w) {
        select(draws[w], multipliers + w * kBlockCounters + i);
      }
    }
  }

 private:
  void select(const Words32& draws, acc_t* multipliers) const {  // [kWords32]
    constexpr int lanes = LaneTypes<acc_t>::count;
    typedef int32_t Decisions __attribute__((vector_size(lanes * sizeof(int32_t))));
    const auto dropped = draws <= last_;
    for (int i = 0; i < kWords32; i += lanes) {
      Decisions part;
      std::memcpy(&part, reinterpret_cast<const char*>(&dropped) + i * sizeof(int32_t), sizeof(part));
      const auto chosen = __builtin_convertvector(part, LaneNumbers<acc_t>);
      store_lanes(chosen ? Lanes<acc_t>{} + dropped_ : Lanes<acc_t>{} + scale_, multipliers + i, lanes);
    }
  }

  const Philox generator_;
  const uint64_t threshold_;
  const uint32_t last_;
  const acc_t scale_;
  const acc_t dropped_;
};

template <typename scalar_t>
void multiply(const scalar_t* input, const accumulator_t<scalar_t>* multipliers, scalar_t* output, int64_t count) {
  using P = Pack<scalar_t>;
  P values = P::load(input, count);
  for (int part = 0; part < P::parts; ++part) {
    values.part[part] = values.part[part] * P::Vec::loadu(multipliers + part * P::Vec::size());
  }
  values.store(output, count);
}

}  // namespace

template <typename scalar_t>
void dropout(const Problem<scalar_t>& problem) {
  constexpr int64_t width = Pack<scalar_t>::size;
  const Multipliers<accumulator_t<scalar_t>> multipliers(problem.seed, problem.p);
  const int64_t blocks = ceil_div(problem.count, int64_t(kBlock));
  parallel_for(0, blocks, kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
    alignas(64) accumulator_t<scalar_t> of_block[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      multipliers.compute(block, of_block);
      const int64_t first = block * kBlock;
      const scalar_t* const input = problem.input + first;
      scalar_t* const output = problem.output + first;
      if (const int64_t count = problem.count - first; count < kBlock) {
        for (int64_t i = 0; i < count; i += width) {
          multiply(input + i, of_block + i, output + i, std::min(width, count - i));
        }
      } else {
        for (int64_t i = 0; i < kBlock; i += width) {
          multiply(input + i, of_block + i, output + i, width);
        }
      }
    }
  });
}

template void dropout(const Problem<float>&);
template void dropout(const Problem<double>&);
template void dropout(const Problem<at::BFloat16>&);
template void dropout(const Problem<at::Half>&);

}  // namespace lightkit::cpu::dropout
