#include "linear_cross_entropy.h"

#include "linear_cross_entropy_passes.h"
#include "linear_cross_entropy_plan.h"
#include "tile_gemm.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace lightkit::cpu {
namespace {

// What the products are computed with: bfloat16 where the machine multiplies that, pairs of features at a time.
template <typename scalar_t, typename Function>
auto with_operand(const LinearCrossEntropy<scalar_t>& args, const Function& function) {
  using acc_t = accumulator_t<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (has_bfloat16_gemm() && args.features % 2 == 0) {
      return function(at::BFloat16());
    }
  }
  return function(acc_t());
}

}  // namespace

template <typename scalar_t>
int64_t linear_cross_entropy_workspace(const LinearCrossEntropy<scalar_t>& args) {
  if (args.rows == 0) {
    return 0;
  }
  return with_operand(args, [&](auto operand) { return make_plan<scalar_t, decltype(operand)>(args).bytes(); });
}

template <typename scalar_t>
void linear_cross_entropy(const LinearCrossEntropy<scalar_t>& args) {
  if (args.rows == 0) {
    return;
  }
  with_operand(args, [&](auto operand) {
    using operand_t = decltype(operand);
    Passes<scalar_t, operand_t>(args, make_plan<scalar_t, operand_t>(args)).run();
  });
}

#define LIGHTKIT_INSTANTIATE(scalar_t)                                                  \
  template int64_t linear_cross_entropy_workspace(const LinearCrossEntropy<scalar_t>&); \
  template void linear_cross_entropy(const LinearCrossEntropy<scalar_t>&);
LIGHTKIT_INSTANTIATE(float)
LIGHTKIT_INSTANTIATE(double)
LIGHTKIT_INSTANTIATE(at::BFloat16)
LIGHTKIT_INSTANTIATE(at::Half)
#undef LIGHTKIT_INSTANTIATE

}  // namespace lightkit::cpu
