// Accumulation types, conversions and 16-byte packs of the CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lightkit::cuda {

template <typename scalar_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename scalar_t>
using accumulator_t = typename Accumulator<scalar_t>::type;

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t widen(scalar_t value) {
  return static_cast<acc_t>(value);
}

// Widens with a shift. With the conversion of sm_90 the compiler would keep the converted values, in twice the
// registers.
template <>
__device__ __forceinline__ float widen<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(value)) << 16);
}

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ scalar_t narrow(acc_t value) {
  return static_cast<scalar_t>(value);
}

// `elements` elements that a thread moves at once; by default 128 bits, the largest transaction.
template <typename scalar_t, int elements = 16 / sizeof(scalar_t)>
struct alignas(elements * sizeof(scalar_t) < 16 ? elements * sizeof(scalar_t) : 16) Pack {
  static constexpr int size = elements;
  scalar_t values[size];
};

// Returns true if an array begins on a 16-byte boundary, as its packs then do.
__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace lightkit::cuda
