#include "linear_cross_entropy.h"

#include "gradient_pass.h"
#include "loss_pass.h"
#include "memory_plan.h"
#include "tile_gemm.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace lightkit::cpu::linear_cross_entropy {
namespace {

// Calls function(operand_t()) with the type of the products' operands: bfloat16 where the machine multiplies pairs of
// bfloat16 features, else the accumulation type.
template <typename scalar_t, typename Function>
auto with_operand(const Problem<scalar_t>& args, const Function& function) {
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
int64_t workspace_bytes(const Problem<scalar_t>& args) {
  if (args.rows == 0) {
    return 0;
  }
  return with_operand(args, [&](auto operand) { return plan_memory<scalar_t, decltype(operand)>(args).bytes(); });
}

template <typename scalar_t>
void run(const Problem<scalar_t>& args) {
  if (args.rows == 0) {
    return;
  }
  with_operand(args, [&](auto operand) {
    using operand_t = decltype(operand);
    State<scalar_t, operand_t> state(args, plan_memory<scalar_t, operand_t>(args));
    LossPass<scalar_t, operand_t> loss(state);
    GradientPass<scalar_t, operand_t> gradients(state);
    for (int64_t row = 0; row < args.rows; row += state.plan.chunk) {
      state.set_chunk(row);
      loss.run();
      if (args.gradient_scale != nullptr) {
        gradients.run();
      }
    }
  });
}

#define LIGHTKIT_INSTANTIATE(scalar_t)                        \
  template int64_t workspace_bytes(const Problem<scalar_t>&); \
  template void run(const Problem<scalar_t>&);
LIGHTKIT_INSTANTIATE(float)
LIGHTKIT_INSTANTIATE(double)
LIGHTKIT_INSTANTIATE(at::BFloat16)
LIGHTKIT_INSTANTIATE(at::Half)
#undef LIGHTKIT_INSTANTIATE

}  // namespace lightkit::cpu::linear_cross_entropy
