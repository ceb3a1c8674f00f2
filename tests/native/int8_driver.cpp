// Runs the kernels of quantized networks without torch's dispatcher, for test_int8_targets.py.

#include "../../csrc/kernels/cpu/common/aligned_buffer.h"
#include "../../csrc/kernels/cpu/fake_quantize/fake_quantize.h"
#include "../../csrc/kernels/cpu/int8_chain/int8_chain.h"

#include <memory>

using namespace lightkit::cpu::int8_chain;

// All else is hidden: a process loads several libraries, whose constants differ.
#define EXPORTED extern "C" __attribute__((visibility("default")))

// `numbers` has, for each layer, the members of Shape in their order, and channels_before. `output` is that of the last
// layer, of `images` contiguous images.
EXPORTED void run_chain(
    int64_t layers,
    const int64_t* numbers,
    const int8_t* const* weights,
    const int32_t* const* biases,
    const float* const* multipliers,
    const float* input,
    int64_t images,
    float inverse_scale,
    float* output) {
  std::vector<std::vector<uint8_t>> packed;
  std::vector<Layer> chain;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t* n = numbers + l * 19;
    const Shape shape{
        .in_channels = n[0],
        .height = n[1],
        .width = n[2],
        .out_channels = n[3],
        .rows = n[4],
        .columns = n[5],
        .kernel_height = n[6],
        .kernel_width = n[7],
        .stride = {n[8], n[9]},
        .padding = {n[10], n[11]},
        .dilation = {n[12], n[13]},
        .groups = n[14],
        .relu = n[15] != 0,
        .pool = n[16] != 0,
        .zero_point = static_cast<int32_t>(n[17]),
    };
    packed.emplace_back(packed_bytes(shape));
    pack(shape, {weights[l], biases[l], multipliers[l], n[18]}, packed.back().data());
    chain.push_back({shape, packed.back().data()});
  }
  const int64_t pixels = chain[0].shape.height * chain[0].shape.width;
  const int64_t values = pixels * chain[0].shape.in_channels;
  std::unique_ptr<lightkit::cpu::AlignedBuffer<uint8_t>> memory;
  const auto allocate = [&](int64_t bytes) {
    memory = std::make_unique<lightkit::cpu::AlignedBuffer<uint8_t>>(bytes);
    return memory->data();
  };
  forward(chain, {input, {values, pixels, chain[0].shape.width, 1}, images, inverse_scale}, output, allocate);
}

EXPORTED void round_rows(
    const float* weights, float* outputs, float* scales, int64_t rows, int64_t columns, int64_t bits) {
  lightkit::cpu::fake_quantize::fake_quantize({{weights, outputs, scales, rows, columns}}, bits);
}
