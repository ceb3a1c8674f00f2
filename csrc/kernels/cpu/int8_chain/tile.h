// A register tile: the sums of some positions by some vectors of output channels, and what follows the sums.
#pragma once

#include "../common/simd.h"
#include "tuning.h"
#include "vectors.h"

#include <algorithm>

namespace lightkit::cpu::int8_chain {

// Some vectors of a layer's output channels, and the way through the inputs of a position.
struct TileTask {
  int64_t quads;
  const int32_t* offsets;     // [quads] of the bytes of a quad, from the first input of a position
  const int8_t* weights;      // [quads, weight_step]
  int64_t weight_step;        // bytes
  const int32_t* bias;        // [vectors * kLanes]
  const float* multiplier;    // [vectors * kLanes]
  int64_t channels;           // that are stored, at most vectors * kLanes
  bool last;                  // the outputs are float
  bool relu;                  // of the last layer; of others it is in `least`
  int32_t zero_point, least;  // of the outputs, as in `quantized`
};

// Stores the output of a position, from a vector's sums: one byte or, of the last layer, one float a channel.
inline void store_vector(const TileTask& task, int64_t vector, Sums sums, void* output) {
  const int64_t offset = vector * kLanes;
  const int64_t count = std::min(kLanes, task.channels - offset);
  Floats y = multiply(to_float(sums), load_floats(task.multiplier + offset));
  if (task.last) {
    store(task.relu ? at_least(y, 0) : y, static_cast<float*>(output) + offset, count);
  } else {
    store(quantized(y, task.zero_point, task.least), static_cast<uint8_t*>(output) + offset, count);
  }
}

// Computes `positions` positions, whose inputs begin at `inputs`. With a pool, four consecutive ones have one output.
template <int vectors, int positions, bool pool>
void compute_tile(const TileTask& task, const uint8_t* const* inputs, void* const* outputs) {
  Sums sums[positions][vectors];
  LIGHTKIT_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const Sums bias = load_sums(task.bias + v * kLanes);
    LIGHTKIT_UNROLL
    for (int p = 0; p < positions; ++p) {
      sums[p][v] = bias;
    }
  }
  // One loop: the compiler copies the sums in each step of nested loops.
  const int8_t* weights = task.weights;
  for (int64_t quad = 0; quad < task.quads; ++quad) {
    const int64_t offset = task.offsets[quad];
    Weights w[vectors];
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      w[v] = load_weights(weights + v * kWeightBytes);
    }
    weights += task.weight_step;
    LIGHTKIT_UNROLL
    for (int p = 0; p < positions; ++p) {
      const Inputs four = load_inputs(inputs[p] + offset);
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sums[p][v] = add_products(sums[p][v], four, w[v]);
      }
    }
  }
  constexpr int window = pool ? 4 : 1;
  LIGHTKIT_UNROLL
  for (int p = 0; p < positions; p += window) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      Sums largest = sums[p][v];
      LIGHTKIT_UNROLL
      for (int i = 1; i < window; ++i) {
        largest = maximum(largest, sums[p + i][v]);
      }
      store_vector(task, v, largest, outputs[p / window]);
    }
  }
}

using ComputeTile = void (*)(const TileTask& task, const uint8_t* const* inputs, void* const* outputs);

// Returns the most outputs of a tile.
constexpr int tile_outputs(int vectors, bool pool) {
  return kPositions[vectors - 1] / (pool ? 4 : 1);
}

// Returns the function of a tile of `count` outputs, from 1 to tile_outputs(vectors, pool).
ComputeTile find_tile(int vectors, int count, bool pool);

}  // namespace lightkit::cpu::int8_chain
