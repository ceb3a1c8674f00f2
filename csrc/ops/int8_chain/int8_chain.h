// The ops on chains of 8-bit layers, as in cross_entropy.h.
#pragma once

#include "../../kernels/cpu/int8_chain/int8_chain.h"
#include "../common/checks.h"
#include "../common/tensors.h"

#include <vector>

namespace lightkit {

// The zero point of the images, and then the numbers of each layer, in the order of Int8LayerPlan.
inline constexpr size_t kInt8LayerNumbers = 15;

// The numbers of a layer, which do not depend on the images.
struct Int8LayerPlan {
  int64_t linear;                       // 0 or 1
  int64_t out_channels, in_channels;    // of all groups; a linear layer's features
  int64_t kernel_height, kernel_width;  // 1 of a linear layer, as all numbers up to groups
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  int64_t relu, pool;         // 0 or 1; a linear layer has no pool
  int64_t output_zero_point;  // 0 to 255
  int64_t input_zero_point;   // the previous layer's output_zero_point, or that of the images
  int64_t channels_before;    // as in cpu::int8_chain::Parameters

  // Returns the sizes for the kernels, except those that depend on the images.
  cpu::int8_chain::Shape shape() const;
};

using Int8Plan = std::vector<Int8LayerPlan>;

// The height and width of a layer's input, and of its convolution's output before the pool, which may be symbols.
struct Int8LayerSizes {
  c10::SymInt height, width, rows, columns;
};

// Returns the plan of a list of numbers. Raises a ValueError for numbers that describe no chain; the messages name the
// op, the layer, the value and what was expected.
Int8Plan read_int8_plan(const char* op, at::IntArrayRef numbers);

// Checks input, packed parameters and scale against a plan, and returns the sizes of the layers.
std::vector<Int8LayerSizes> check_int8_chain(
    const at::Tensor& input, const at::Tensor& packed, const Int8Plan& plan, double input_scale);

// Checks the parameters of the layers against a plan.
void check_int8_parameters(
    at::TensorList weights, at::TensorList biases, at::TensorList multipliers, const Int8Plan& plan);

// Returns the bytes of the packed parameters of all layers.
int64_t int8_packed_bytes(const Int8Plan& plan);

// Allocates the output, in channels-last order behind a convolution.
at::Tensor allocate_int8_output(
    const at::Tensor& input, const Int8Plan& plan, const std::vector<Int8LayerSizes>& sizes);

// lightkit::int8_chain. `packed` is what int8_chain_pack returns for the same plan. No gradient goes through the op.
using Int8ChainOp =
    at::Tensor(const at::Tensor& input, const at::Tensor& packed, at::IntArrayRef plan, double input_scale);
Int8ChainOp int8_chain_meta, int8_chain_cpu;

// lightkit::int8_chain_pack: [bytes] uint8.
using Int8ChainPackOp =
    at::Tensor(at::TensorList weights, at::TensorList biases, at::TensorList multipliers, at::IntArrayRef plan);
Int8ChainPackOp int8_chain_pack_meta, int8_chain_pack_cpu;

}  // namespace lightkit
