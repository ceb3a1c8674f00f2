// lightkit::int8_chain and lightkit::int8_chain_pack: the Meta kernels.

#include "int8_chain.h"

namespace lightkit {

using at::Tensor;

Tensor int8_chain_meta(const Tensor& input, const Tensor& packed, at::IntArrayRef numbers, double input_scale) {
  const Int8Plan plan = read_int8_plan("int8_chain", numbers);
  return allocate_int8_output(input, plan, check_int8_chain(input, packed, plan, input_scale));
}

Tensor int8_chain_pack_meta(
    at::TensorList weights, at::TensorList biases, at::TensorList multipliers, at::IntArrayRef numbers) {
  const Int8Plan plan = read_int8_plan("int8_chain_pack", numbers);
  check_int8_parameters(weights, biases, multipliers, plan);
  return empty_symint({int8_packed_bytes(plan)}, weights[0].options().dtype(at::kByte));
}

}  // namespace lightkit
