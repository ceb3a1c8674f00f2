#include "cross_entropy.h"

#include "../common/parallel.h"
#include "interleaved_rows.h"
#include "tuning.h"
#include "wide_rows.h"

#include <algorithm>

namespace lightkit::cpu::cross_entropy {

template <typename scalar_t>
void run(const Rows<scalar_t>& args) {
  if (args.rows == 0 || args.classes == 0) {
    return;
  }
  if (args.inner > 1 || args.classes <= kNarrowClasses) {
    const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / (args.classes * InterleavedRows<scalar_t>::kLanes));
    parallel_for(0, InterleavedRows<scalar_t>::count(args), grain, [&](int64_t begin, int64_t end) {
      InterleavedRows<scalar_t> rows(args);
      for (int64_t i = begin; i < end; ++i) {
        rows.run(i);
      }
    });
  } else {
    const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / args.classes);
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

template void run(const Rows<float>&);
template void run(const Rows<double>&);
template void run(const Rows<at::BFloat16>&);
template void run(const Rows<at::Half>&);

}  // namespace lightkit::cpu::cross_entropy
