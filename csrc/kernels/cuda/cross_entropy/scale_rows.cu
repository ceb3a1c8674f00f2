// Applies the upstream gradient of a cross-entropy to the gradient that its forward pass computed.
#include "cross_entropy.h"

#include "../common/dtype.cuh"
#include "tuning.h"

#include <algorithm>

namespace lightkit::cuda::cross_entropy {
namespace {

// Scales the elements [begin, begin + size) of the gradient.
template <typename scalar_t, int size, typename index_t>
__device__ __forceinline__ void scale_pack(
    scalar_t* gradient, index_t begin, index_t classes, const accumulator_t<scalar_t>* factor, bool per_row) {
  using acc_t = accumulator_t<scalar_t>;
  index_t row = per_row ? begin / classes : 0;
  index_t next = per_row ? (row + 1) * classes - begin : size;  // elements up to the next row
  acc_t by = factor[row];
  if (by == acc_t(1) && next >= size) {
    return;
  }
  auto pack = *reinterpret_cast<const Pack<scalar_t, size>*>(gradient + begin);
#pragma unroll
  for (int k = 0; k < size; ++k) {
    if (static_cast<index_t>(k) == next) {
      by = factor[++row];
      next += classes;
    }
    pack.values[k] = by == acc_t(1) ? pack.values[k] : narrow<scalar_t>(widen<acc_t>(pack.values[k]) * by);
  }
  *reinterpret_cast<Pack<scalar_t, size>*>(gradient + begin) = pack;
}

// `index_t` has 32 bits if they suffice: divisions of 64 bits are slow.
template <typename scalar_t, typename index_t>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(
    scalar_t* gradient, index_t count, index_t classes, const accumulator_t<scalar_t>* factor, bool per_row) {
  constexpr int size = Pack<scalar_t>::size;
  if (!per_row && *factor == accumulator_t<scalar_t>(1)) {
    return;
  }
  const index_t stride = static_cast<index_t>(gridDim.x) * kScaleThreads;
  const index_t first = static_cast<index_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  const index_t packs = is_aligned(gradient) ? count / size : 0;
  for (index_t i = first; i < packs; i += stride) {
    scale_pack<scalar_t, size>(gradient, i * size, classes, factor, per_row);
  }
  for (index_t i = packs * size + first; i < count; i += stride) {
    scale_pack<scalar_t, 1>(gradient, i, classes, factor, per_row);
  }
}

template <typename scalar_t>
cudaError_t launch_scale(
    void* gradient, int64_t rows, int64_t classes, const void* factor, bool per_row, cudaStream_t stream) {
  const int64_t count = rows * classes;
  if (count == 0) {
    return cudaSuccess;
  }
  const int64_t wanted = (count / Pack<scalar_t>::size + kScaleThreads) / kScaleThreads;
  const auto blocks = static_cast<unsigned>(std::min(wanted, kMaxScaleBlocks));
  auto* values = static_cast<scalar_t*>(gradient);
  const auto* factors = static_cast<const accumulator_t<scalar_t>*>(factor);
  // 2^31 is so far below 2^32 that no index overflows by a stride.
  if (count < int64_t{1} << 31) {
    scale_kernel<scalar_t, uint32_t><<<blocks, kScaleThreads, 0, stream>>>(
        values, static_cast<uint32_t>(count), static_cast<uint32_t>(classes), factors, per_row);
  } else {
    scale_kernel<scalar_t, uint64_t><<<blocks, kScaleThreads, 0, stream>>>(
        values, static_cast<uint64_t>(count), static_cast<uint64_t>(classes), factors, per_row);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t scale_rows(
    void* gradient,
    ElementType type,
    int64_t rows,
    int64_t classes,
    const void* factor,
    bool per_row,
    cudaStream_t stream) {
  switch (type) {
    case ElementType::Float:
      return launch_scale<float>(gradient, rows, classes, factor, per_row, stream);
    case ElementType::Double:
      return launch_scale<double>(gradient, rows, classes, factor, per_row, stream);
    case ElementType::BFloat16:
      return launch_scale<__nv_bfloat16>(gradient, rows, classes, factor, per_row, stream);
    case ElementType::Half:
      return launch_scale<__half>(gradient, rows, classes, factor, per_row, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lightkit::cuda::cross_entropy
