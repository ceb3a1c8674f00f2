// The results of a correlation, computed in pieces: each piece has its moments, which are then added in a fixed order.
#pragma once

#include "../common/pieces.h"
#include "kernels.h"

namespace lightkit::cpu::conv2d {

// Calls run(scratch, begin, end, moments) for pieces of the items of work, such as bands of images. `moments` gets
// those of the results of a piece, or is null.
template <typename T, typename MakeScratch, typename Run>
void correlate_in_pieces(
    const CorrelationProblem<T>& problem,
    int64_t items,
    int64_t macs,
    const MakeScratch& make_scratch,
    const Run& run) {
  const int64_t piece = std::max<int64_t>(1, items / kPieces);
  const bool has_moments = problem.moments != nullptr;
  std::vector<Moments> moments(has_moments ? ceil_div(items, piece) : 0, Moments(problem.correlation.out_channels));
  in_pieces(items, piece, macs, make_scratch, [&](auto& scratch, int64_t begin, int64_t end) {
    run(scratch, begin, end, has_moments ? &moments[begin / piece] : nullptr);
  });
  for (const Moments& each : moments) {
    problem.moments->add(each);
  }
}

}  // namespace lightkit::cpu::conv2d
