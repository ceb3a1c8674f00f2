// lightkit::int8_chain and lightkit::int8_chain_pack on a CPU.

#include "int8_chain.h"

namespace lightkit {

using at::Tensor;

namespace {

// The kernels read int32 and float in the packed parameters, and load whole cache lines of weights.
constexpr uintptr_t kPackedAlignment = 64;

bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kPackedAlignment == 0;
}

}  // namespace

Tensor int8_chain_cpu(const Tensor& input, const Tensor& packed, at::IntArrayRef numbers, double input_scale) {
  constexpr auto op = "int8_chain";
  const Int8Plan plan = read_int8_plan(op, numbers);
  const auto sizes = check_int8_chain(input, packed, plan, input_scale);
  check_memory(op, "the input", input);
  check_memory(op, "packed", packed);
  const Tensor output = allocate_int8_output(input, plan, sizes);
  if (output.numel() == 0) {
    return output;
  }
  Tensor parameters = packed.contiguous();
  if (!is_aligned(parameters.const_data_ptr())) {
    // Fresh memory of torch is aligned.
    parameters = empty_like(packed).copy_(packed);
  }
  std::vector<cpu::int8_chain::Layer> layers;
  layers.reserve(plan.size());
  const uint8_t* next = parameters.const_data_ptr<uint8_t>();
  for (size_t l = 0; l < plan.size(); ++l) {
    const auto number = [](const c10::SymInt& size) { return size.expect_int(); };
    cpu::int8_chain::Shape shape = plan[l].shape();
    shape.height = number(sizes[l].height);
    shape.width = number(sizes[l].width);
    shape.rows = number(sizes[l].rows);
    shape.columns = number(sizes[l].columns);
    layers.push_back({shape, next});
    next += cpu::int8_chain::packed_bytes(shape);
  }
  cpu::int8_chain::Images images{
      .data = input.const_data_ptr<float>(),
      .strides = {input.stride(0), input.stride(1), 0, 0},
      .count = input.size(0),
      .inverse_scale = 1 / static_cast<float>(input_scale),
  };
  if (input.dim() == 4) {
    images.strides[2] = input.stride(2);
    images.strides[3] = input.stride(3);
  }
  // Fresh memory for large images would take longer than the kernels.
  Tensor activations;
  const auto allocate = [&](int64_t bytes) {
    activations = pooled_empty({bytes}, input.options().dtype(at::kByte));
    return activations.mutable_data_ptr<uint8_t>();
  };
  cpu::int8_chain::forward(layers, images, output.mutable_data_ptr<float>(), allocate);
  return output;
}

Tensor int8_chain_pack_cpu(
    at::TensorList weights, at::TensorList biases, at::TensorList multipliers, at::IntArrayRef numbers) {
  constexpr auto op = "int8_chain_pack";
  const Int8Plan plan = read_int8_plan(op, numbers);
  check_int8_parameters(weights, biases, multipliers, plan);
  const Tensor packed = empty({int8_packed_bytes(plan)}, weights[0].options().dtype(at::kByte));
  auto* next = packed.mutable_data_ptr<uint8_t>();
  for (size_t l = 0; l < plan.size(); ++l) {
    check_memory(op, "a weight", weights[l]);
    check_memory(op, "a bias", biases[l]);
    check_memory(op, "a multiplier", multipliers[l]);
    // Tensors of a list may have a pending negation.
    const auto dense = [](const Tensor& tensor) { return tensor.resolve_neg().contiguous(); };
    const Tensor weight = dense(weights[l]);
    const Tensor bias = dense(biases[l]);
    const Tensor multiplier = dense(multipliers[l]);
    const auto shape = plan[l].shape();
    cpu::int8_chain::pack(
        shape,
        {.weight = weight.const_data_ptr<int8_t>(),
         .bias = bias.const_data_ptr<int32_t>(),
         .multiplier = multiplier.const_data_ptr<float>(),
         .channels_before = plan[l].channels_before},
        next);
    next += cpu::int8_chain::packed_bytes(shape);
  }
  return packed;
}

}  // namespace lightkit
