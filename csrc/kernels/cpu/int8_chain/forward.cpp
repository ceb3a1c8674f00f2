#include "../common/pieces.h"
#include "int8_chain.h"
#include "layer.h"
#include "packed.h"
#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace lightkit::cpu::int8_chain {
namespace {

constexpr int64_t kCacheLine = 64;

// Returns the multiply-adds of a layer on an image.
int64_t products(const Shape& s) {
  return s.rows * s.columns * s.out_channels * (s.in_channels / s.groups) * s.kernel_height * s.kernel_width;
}

int64_t padded_bytes(const Shape& s) {
  return (s.height + 2 * s.padding[0]) * (s.width + 2 * s.padding[1]) * s.in_channels;
}

// Where the inputs of each layer lie in a thread's memory.
struct Plan {
  const std::vector<Layer>& layers;
  std::vector<int64_t> image_steps;         // bytes from one image to the next
  std::vector<int64_t> offsets;             // of the inputs of all images of a group
  std::vector<std::vector<int32_t>> quads;  // offsets_of_quads of each layer
  int64_t group;                            // images that go through a layer before the next layer
  int64_t bytes;                            // of a thread

  Plan(const std::vector<Layer>& chain, int64_t images, int64_t threads) : layers(chain) {
    int64_t image_bytes = 0;
    for (const Layer& layer : layers) {
      image_steps.push_back(round_up(padded_bytes(layer.shape) + kReadBehind, kCacheLine));
      image_bytes += image_steps.back();
      quads.push_back(offsets_of_quads(layer.shape));
    }
    group = std::clamp<int64_t>(kGroupBytes / image_bytes, 1, kMaxGroup);
    group = std::min(group, ceil_div(images, threads));
    bytes = 0;
    for (const int64_t step : image_steps) {
      offsets.push_back(bytes);
      bytes += group * step;
    }
  }

  // Prepares the memory of a thread. The padding stays as it is: layers write the interiors alone.
  void fill_padding(uint8_t* memory) const {
    for (size_t l = 0; l < layers.size(); ++l) {
      const Shape& s = layers[l].shape;
      if (s.padding[0] != 0 || s.padding[1] != 0) {
        std::memset(memory + offsets[l], s.zero_point, group * image_steps[l]);
      }
    }
  }
};

// Returns where the outputs of layer `l` go; those of the last layer go to `output`.
Destination destination_of(const Plan& plan, size_t l, uint8_t* memory, float* output) {
  const Shape& s = plan.layers[l].shape;
  if (l + 1 == plan.layers.size()) {
    const int64_t rows = s.pool ? s.rows / 2 : s.rows;
    const int64_t columns = s.pool ? s.columns / 2 : s.columns;
    const auto pixel_step = s.out_channels * int64_t(sizeof(float));
    return {
        .data = reinterpret_cast<uint8_t*>(output),
        .image_step = rows * columns * pixel_step,
        .row_step = columns * pixel_step,
        .pixel_step = pixel_step,
        .channel_bytes = sizeof(float),
        .zero_point = 0,
        .last = true,
    };
  }
  const Shape& next = plan.layers[l + 1].shape;
  // A linear layer reads the pixels of its input as one.
  const int64_t columns = s.pool ? s.columns / 2 : s.columns;
  const int64_t row_step = (columns + 2 * next.padding[1]) * s.out_channels;
  return {
      .data = memory + plan.offsets[l + 1] + next.padding[0] * row_step + next.padding[1] * s.out_channels,
      .image_step = plan.image_steps[l + 1],
      .row_step = row_step,
      .pixel_step = s.out_channels,
      .channel_bytes = 1,
      .zero_point = next.zero_point,
      .last = false,
  };
}

}  // namespace

void forward(const std::vector<Layer>& layers, const Images& images, float* output, const Allocate& allocate) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const Plan plan(layers, images.count, threads);
  // Each thread that takes part has a piece, at least.
  uint8_t* const memory_of_all = allocate(std::min(threads, ceil_div(images.count, plan.group)) * plan.bytes);
  std::atomic<int64_t> taken{0};
  double total = 0;
  for (const Layer& layer : layers) {
    total += static_cast<double>(products(layer.shape));
  }
  const Shape& last = layers.back().shape;
  const int64_t pixels = last.pool ? (last.rows / 2) * (last.columns / 2) : last.rows * last.columns;
  const double macs = std::min(total * static_cast<double>(images.count), 0x1p62) / kProductsPerFloat;
  in_pieces(
      images.count,
      plan.group,
      static_cast<int64_t>(macs),
      [&] {
        uint8_t* const memory = memory_of_all + taken++ * plan.bytes;
        plan.fill_padding(memory);
        return memory;
      },
      [&](uint8_t* memory, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          quantize(layers[0].shape, images, i, memory + plan.offsets[0] + (i - begin) * plan.image_steps[0]);
        }
        float* results = output + begin * pixels * last.out_channels;
        for (size_t l = 0; l < layers.size(); ++l) {
          compute_layer(
              layers[l],
              plan.quads[l].data(),
              end - begin,
              memory + plan.offsets[l],
              plan.image_steps[l],
              destination_of(plan, l, memory, results));
        }
      });
}

}  // namespace lightkit::cpu::int8_chain
