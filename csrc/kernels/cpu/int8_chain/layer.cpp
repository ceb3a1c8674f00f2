#include "layer.h"

#include "packed.h"
#include "tile.h"

namespace lightkit::cpu::int8_chain {
namespace {

// Walks over the outputs of a group of images, and tells where the inputs and the output of each are.
class Walk {
 public:
  Walk(const Shape& s, const uint8_t* input, int64_t image_step, int64_t first_channel, const Destination& destination)
      : destination_(destination),
        rows_(s.pool ? s.rows / 2 : s.rows),
        columns_(s.pool ? s.columns / 2 : s.columns),
        window_(s.pool ? 2 : 1),
        column_step_(s.stride[1] * s.in_channels),
        row_step_(s.stride[0] * (s.width + 2 * s.padding[1]) * s.in_channels),
        image_step_(image_step),
        image_(input + first_channel) {}

  int64_t outputs_of_image() const {
    return rows_ * columns_;
  }

  // Writes the inputs of the next output, one or four of a pool, and its place in the destination.
  void next(const uint8_t** inputs, void** output, int64_t channel_offset) {
    const uint8_t* corner = image_ + window_ * (row_ * row_step_ + column_ * column_step_);
    inputs[0] = corner;
    if (window_ == 2) {
      inputs[1] = corner + column_step_;
      inputs[2] = corner + row_step_;
      inputs[3] = corner + row_step_ + column_step_;
    }
    *output = destination_.data + index_ * destination_.image_step + row_ * destination_.row_step +
        column_ * destination_.pixel_step + channel_offset;
    if (++column_ == columns_) {
      column_ = 0;
      if (++row_ == rows_) {
        row_ = 0;
        ++index_;
        image_ += image_step_;
      }
    }
  }

 private:
  const Destination& destination_;
  const int64_t rows_, columns_, window_, column_step_, row_step_, image_step_;
  const uint8_t* image_;
  int64_t index_ = 0, row_ = 0, column_ = 0;
};

}  // namespace

std::vector<int32_t> offsets_of_quads(const Shape& s) {
  const Packing packing(s);
  const int64_t row_bytes = (s.width + 2 * s.padding[1]) * s.in_channels;
  std::vector<int32_t> offsets;
  offsets.reserve(packing.quads);
  for (int64_t row = 0; row < s.kernel_height; ++row) {
    for (int64_t run = 0; run < packing.row_runs; ++run) {
      const int64_t first = s.dilation[0] * row * row_bytes + s.dilation[1] * run * s.in_channels;
      for (int64_t quad = 0; quad < packing.run_quads; ++quad) {
        offsets.push_back(static_cast<int32_t>(first + 4 * quad));
      }
    }
  }
  return offsets;
}

void compute_layer(
    const Layer& layer,
    const int32_t* offsets,
    int64_t images,
    const uint8_t* input,
    int64_t image_step,
    const Destination& destination) {
  const Shape& s = layer.shape;
  const Packing packing(s);
  const int window = s.pool ? 4 : 1;
  for (int64_t group = 0; group < s.groups; ++group) {
    int64_t block = 0;
    for (int64_t vector = 0; vector < packing.vectors; vector += block) {
      block = std::min<int64_t>(packing.block_vectors(vector), kMaxVectors);
      const int64_t lane = (group * packing.vectors + vector) * kLanes;
      const int64_t channel = vector * kLanes;
      const TileTask task{
          .quads = packing.quads,
          .offsets = offsets,
          .weights = reinterpret_cast<const int8_t*>(layer.packed + packing.vector_offset(group, vector)),
          .weight_step = packing.block_vectors(vector) * kWeightBytes,
          .bias = reinterpret_cast<const int32_t*>(layer.packed) + lane,
          .multiplier = reinterpret_cast<const float*>(layer.packed + packing.multiplier_offset()) + lane,
          .channels = packing.group_out - channel,
          .last = destination.last,
          .relu = s.relu,
          .zero_point = destination.zero_point,
          .least = s.relu ? destination.zero_point : 0,
      };
      Walk walk(s, input, image_step, group * packing.group_in, destination);
      const int64_t channel_offset = (group * packing.group_out + channel) * destination.channel_bytes;
      // Tiles of about the same size: a small one takes as long as a larger one.
      const int64_t outputs = images * walk.outputs_of_image();
      const int64_t tiles = ceil_div(outputs, tile_outputs(static_cast<int>(block), s.pool));
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t count = (tile + 1) * outputs / tiles - tile * outputs / tiles;
        const uint8_t* inputs[kMaxPositions];
        void* places[kMaxPositions];
        for (int64_t i = 0; i < count; ++i) {
          walk.next(inputs + i * window, places + i, channel_offset);
        }
        find_tile(static_cast<int>(block), static_cast<int>(count), s.pool)(task, inputs, places);
      }
    }
  }
}

}  // namespace lightkit::cpu::int8_chain
