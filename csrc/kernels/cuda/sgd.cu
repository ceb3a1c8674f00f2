#include "sgd.h"

#include "dtype.cuh"

#include <algorithm>
#include <map>
#include <tuple>

namespace lightkit::cuda {
namespace {

constexpr int kThreads = 256;

// As many tensors as fit into the 4 KiB of a kernel's arguments.
constexpr int kTensorsPerLaunch = 90;

// A block works on one chunk of one tensor. Chunks are made small enough for this many blocks where the
// tensors allow it, so that one tensor alone still fills the device.
constexpr int64_t kWantedBlocks = 1024;
constexpr int64_t kSmallestChunk = 2048;
constexpr int64_t kLargestChunk = 65536;

struct Batch {
  void* parameter[kTensorsPerLaunch];
  const void* gradient[kTensorsPerLaunch];
  void* momentum[kTensorsPerLaunch];
  int64_t numel[kTensorsPerLaunch];
  int first_chunk[kTensorsPerLaunch + 1];  // the chunks of tensor i are first_chunk[i] .. first_chunk[i + 1]
  int64_t chunk;
  SgdOptions options;
};
static_assert(sizeof(Batch) <= 4096, "the arguments of a kernel are limited to 4 KiB");

// The update of ../sgd.h for one element. A term that is off is left out, not multiplied by 0, which would
// make NaN of an infinite parameter or of a momentum buffer that was never written.
template <typename scalar_t, bool first>
__device__ __forceinline__ void update(
    scalar_t& parameter, scalar_t gradient, scalar_t* momentum, const SgdOptions& options) {
  using acc_t = accumulator_t<scalar_t>;
  const acc_t p = widen<acc_t>(parameter);
  const double factor = options.maximize ? -options.gradient_factor : options.gradient_factor;
  acc_t direction = static_cast<acc_t>(factor) * widen<acc_t>(gradient);
  if (options.weight_decay != 0) {
    direction += static_cast<acc_t>(options.weight_decay) * p;
  }
  if (momentum != nullptr) {
    const acc_t mu = static_cast<acc_t>(options.momentum);
    const acc_t m =
        first ? direction : mu * widen<acc_t>(*momentum) + static_cast<acc_t>(1 - options.dampening) * direction;
    *momentum = narrow<scalar_t>(m);
    direction = options.nesterov ? direction + mu * m : m;
  }
  parameter = narrow<scalar_t>(p - static_cast<acc_t>(options.lr) * direction);
}

template <typename scalar_t, bool first>
__global__ void __launch_bounds__(kThreads) sgd_kernel(const __grid_constant__ Batch batch, int tensors) {
  constexpr int width = Pack<scalar_t>::size;
  SgdOptions options = batch.options;
  if (options.skip_on_device != nullptr && *options.skip_on_device != 0) {
    return;
  }
  if (options.lr_on_device != nullptr) {
    options.lr = *options.lr_on_device;
  }
  if (options.scale_on_device != nullptr) {
    options.gradient_factor /= *options.scale_on_device;
  }
  int low = 0, high = tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_chunk[middle] <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - batch.first_chunk[low]) * batch.chunk;
  const int64_t end = min(begin + batch.chunk, batch.numel[low]);
  auto* parameter = static_cast<scalar_t*>(batch.parameter[low]);
  const auto* gradient = static_cast<const scalar_t*>(batch.gradient[low]);
  auto* momentum = static_cast<scalar_t*>(batch.momentum[low]);

  int64_t packed_end = begin;
  if (is_aligned(parameter) && is_aligned(gradient) && is_aligned(momentum)) {
    // Chunks are multiples of a pack: only the end of a tensor is left over.
    packed_end = begin + (end - begin) / width * width;
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * width; i < packed_end; i += kThreads * width) {
      auto p = *reinterpret_cast<const Pack<scalar_t>*>(parameter + i);
      const auto g = *reinterpret_cast<const Pack<scalar_t>*>(gradient + i);
      Pack<scalar_t> m;
      if (momentum != nullptr && !first) {
        m = *reinterpret_cast<const Pack<scalar_t>*>(momentum + i);
      }
#pragma unroll
      for (int k = 0; k < width; ++k) {
        update<scalar_t, first>(p.values[k], g.values[k], momentum == nullptr ? nullptr : &m.values[k], options);
      }
      *reinterpret_cast<Pack<scalar_t>*>(parameter + i) = p;
      if (momentum != nullptr) {
        *reinterpret_cast<Pack<scalar_t>*>(momentum + i) = m;
      }
    }
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
    update<scalar_t, first>(parameter[i], gradient[i], momentum == nullptr ? nullptr : momentum + i, options);
  }
}

template <typename scalar_t>
cudaError_t launch(const Batch& batch, int tensors, bool first, cudaStream_t stream) {
  const int blocks = batch.first_chunk[tensors];
  if (first) {
    sgd_kernel<scalar_t, true><<<blocks, kThreads, 0, stream>>>(batch, tensors);
  } else {
    sgd_kernel<scalar_t, false><<<blocks, kThreads, 0, stream>>>(batch, tensors);
  }
  return cudaGetLastError();
}

cudaError_t launch_typed(ParameterType type, const Batch& batch, int tensors, bool first, cudaStream_t stream) {
  switch (type) {
    case ParameterType::Float:
      return launch<float>(batch, tensors, first, stream);
    case ParameterType::Double:
      return launch<double>(batch, tensors, first, stream);
    case ParameterType::BFloat16:
      return launch<__nv_bfloat16>(batch, tensors, first, stream);
    case ParameterType::Half:
      return launch<__half>(batch, tensors, first, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t sgd(const std::vector<SgdTensor>& tensors, cudaStream_t stream) {
  // What one launch can do together: one type, one set of options, all or none at their first step.
  std::map<std::tuple<ParameterType, const SgdOptions*, bool>, std::vector<const SgdTensor*>> kinds;
  for (const auto& tensor : tensors) {
    if (tensor.numel > 0) {
      kinds[{tensor.type, tensor.options, tensor.first}].push_back(&tensor);
    }
  }
  for (const auto& [kind, members] : kinds) {
    const auto& [type, options, first] = kind;
    for (size_t start = 0; start < members.size(); start += kTensorsPerLaunch) {
      const int count = static_cast<int>(std::min<size_t>(kTensorsPerLaunch, members.size() - start));
      int64_t elements = 0;
      for (int i = 0; i < count; ++i) {
        elements += members[start + i]->numel;
      }
      Batch batch{};
      batch.options = *options;
      const int64_t share = (elements / kWantedBlocks + kSmallestChunk - 1) / kSmallestChunk * kSmallestChunk;
      batch.chunk = std::clamp(share, kSmallestChunk, kLargestChunk);
      for (int i = 0; i < count; ++i) {
        const SgdTensor& tensor = *members[start + i];
        batch.parameter[i] = tensor.parameter;
        batch.gradient[i] = tensor.gradient;
        batch.momentum[i] = tensor.states[0];
        batch.numel[i] = tensor.numel;
        batch.first_chunk[i + 1] =
            batch.first_chunk[i] + static_cast<int>((tensor.numel + batch.chunk - 1) / batch.chunk);
      }
      if (const auto error = launch_typed(type, batch, count, first, stream); error != cudaSuccess) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace lightkit::cuda
