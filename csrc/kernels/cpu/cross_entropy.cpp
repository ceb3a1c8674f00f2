#include "cross_entropy.h"

#include "cross_entropy_tile.h"
#include "cross_entropy_wide.h"
#include "parallel.h"

#include <algorithm>

namespace lightkit::cpu {
namespace {

// Up to this many classes a row does not fill the vector unit, and rows are worked on side by side.
constexpr int64_t kNarrowClasses = 64;
static_assert(kNarrowClasses <= kMaxStridedClasses);

// A thread is woken for at least this many logits.
constexpr int64_t kGrain = 8192;

}  // namespace

template <typename scalar_t>
void cross_entropy(const CrossEntropyRows<scalar_t>& args) {
  if (args.rows == 0 || args.classes == 0) {
    return;
  }
  if (args.inner > 1 || args.classes <= kNarrowClasses) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (args.classes * Tile<scalar_t>::kLanes));
    parallel_for(0, Tile<scalar_t>::count(args), grain, [&](int64_t begin, int64_t end) {
      Tile<scalar_t> tile(args);
      for (int64_t i = begin; i < end; ++i) {
        tile.run(i);
      }
    });
  } else {
    const int64_t grain = std::max<int64_t>(1, kGrain / args.classes);
    const bool extras = args.softcap != 0 || args.smooth != nullptr || args.probabilities != nullptr;
    parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
      if (extras) {
        WideRows<scalar_t, true>(args).run(begin, end);
      } else {
        WideRows<scalar_t, false>(args).run(begin, end);
      }
    });
  }
}

template void cross_entropy(const CrossEntropyRows<float>&);
template void cross_entropy(const CrossEntropyRows<double>&);
template void cross_entropy(const CrossEntropyRows<at::BFloat16>&);
template void cross_entropy(const CrossEntropyRows<at::Half>&);

}  // namespace lightkit::cpu
