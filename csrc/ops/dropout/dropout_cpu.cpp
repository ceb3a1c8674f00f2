// lightkit::dropout on a CPU.

#include "../../kernels/cpu/dropout/dropout.h"
#include "dropout.h"

namespace lightkit {

using at::Tensor;

namespace {

template <typename scalar_t>
void run(const Tensor& input, int64_t seed, double p, const Tensor& output) {
  cpu::dropout::dropout<scalar_t>(
      {.input = input.const_data_ptr<scalar_t>(),
       .output = output.mutable_data_ptr<scalar_t>(),
       .count = input.numel(),
       .seed = static_cast<uint64_t>(seed),
       .p = p});
}

}  // namespace

Tensor dropout_cpu(const Tensor& input, const Tensor& seed, double p, c10::OptionalArrayRef<int64_t> given) {
  constexpr auto op = "dropout";
  const auto order = check_dropout(input, seed, p, given);
  check_memory(op, "the input", input);
  check_memory(op, "the seed", seed);
  const bool permuted = !is_identity(order);
  const Tensor x = (permuted ? input.permute(order) : input).contiguous();
  const Tensor output = empty(x.sizes(), x.options());
  const int64_t key = *seed.const_data_ptr<int64_t>();
  switch (x.scalar_type()) {
    case at::kFloat:
      run<float>(x, key, p, output);
      break;
    case at::kDouble:
      run<double>(x, key, p, output);
      break;
    case at::kBFloat16:
      run<at::BFloat16>(x, key, p, output);
      break;
    case at::kHalf:
      run<at::Half>(x, key, p, output);
      break;
    default:
      TORCH_CHECK_VALUE(false, op, ": the input must be float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
  return permuted ? output.permute(inverse_order(order)) : output;
}

}  // namespace lightkit
