// Shared parts of the forward algorithms: the sums of a register tile, and ReLU and pool of sums.
#pragma once

#include "kernels.h"
#include "tuning.h"

#include <c10/util/Unroll.h>

#include <type_traits>

namespace lightkit::cpu::layer_chain {

// Writes sums[p] = bias + the products of position p. Static: the compiler then passes the inputs in registers.
template <typename T, int vectors>
static void convolve(
    const Shape& shape,
    const T* const (&inputs)[kPositions],  // each [kernel_height, run], rows `row_size` apart
    const T* weight,                       // [kernel_height, run, vectors, width]
    const T* bias,                         // [vectors, width]
    T* sums) {                             // [kPositions, vectors, width]
  constexpr int width = kWidth<T>;
  const int64_t run = shape.run();
  const int64_t row_size = shape.row_size();
  const T* x[kPositions];
  std::copy_n(inputs, kPositions, x);
  Vec<T> sum[kPositions][vectors];
  LIGHTKIT_UNROLL
  for (int p = 0; p < kPositions; ++p) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sum[p][v] = Vec<T>::loadu(bias + v * width);
    }
  }
  for (int64_t row = 0; row < shape.kernel_height; ++row) {
    for (int64_t i = 0; i < run; ++i) {
      Vec<T> w[vectors];
      LIGHTKIT_UNROLL
      for (int v = 0; v < vectors; ++v) {
        w[v] = Vec<T>::loadu(weight + v * width);
      }
      weight += vectors * width;
      LIGHTKIT_UNROLL
      for (int p = 0; p < kPositions; ++p) {
        const Vec<T> value(x[p][i]);
        LIGHTKIT_UNROLL
        for (int v = 0; v < vectors; ++v) {
          sum[p][v] = at::vec::fmadd(value, w[v], sum[p][v]);
        }
      }
    }
    LIGHTKIT_UNROLL
    for (int p = 0; p < kPositions; ++p) {
      x[p] += row_size;
    }
  }
  LIGHTKIT_UNROLL
  for (int p = 0; p < kPositions; ++p) {
    LIGHTKIT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sum[p][v].store(sums + (p * vectors + v) * width);
    }
  }
}

// Writes the ReLU (if `relu`) and the pool of the first `count` channels of one output.
template <typename T, int window>
void finish(
    const T* sums,  // [window, width], positions `stride` apart
    int64_t stride,
    bool relu,
    T* output,        // [count]
    uint8_t* argmax,  // [count], or null
    int64_t count) {
  using Values = Lanes<T>;
  using Numbers = LaneNumbers<T>;
  Values best = load_lanes<Values>(sums);
  Numbers winner{};
  LIGHTKIT_UNROLL
  for (int q = 1; q < window; ++q) {
    const Values value = load_lanes<Values>(sums + q * stride);
    // The second comparison lets NaN win.
    const auto wins = (value > best) | (value != value);
    best = wins ? value : best;
    winner = wins ? Numbers{} + q : winner;
  }
  // NaN <= 0 is false: the ReLU returns NaN.
  const auto dead = relu ? best <= Values{} : Numbers{};
  store_lanes(dead ? Values{} : best, output, count);
  if (argmax != nullptr) {
    store_lanes(__builtin_convertvector(dead ? Numbers{} + kDead : winner, LaneBytes<T>), argmax, count);
  }
}

// Calls f(n) with `vectors`, from 1 to kVectors, as a compile-time constant.
template <typename F>
void with_vectors(int64_t vectors, const F& f) {
  c10::ForcedUnroll<kVectors>{}([&](auto v) {
    if (vectors == v + 1) {
      f(std::integral_constant<int, v + 1>{});
    }
  });
}

// The packed weight holds the vectors of output channels in blocks of kVectors; the last block may have fewer.
template <typename T>
int64_t ForwardKernel<T>::blocks() const {
  return ceil_div(vectors_, kVectors);
}

template <typename T>
int64_t ForwardKernel<T>::vectors(int64_t block) const {
  return std::min<int64_t>(kVectors, vectors_ - block * kVectors);
}

}  // namespace lightkit::cpu::layer_chain
