// The walk of an optimizer's step over all parameters on a GPU.
//
// A Rule is an algorithm with its hyperparameters, for values of type acc_t. It has: Options; acc_t; make(options, lr,
// factor of the gradients, count) -> Rule; and update(value, gradient, states, tensor), which updates one element.
#pragma once

#include "../../common/ceil_div.h"
#include "../../optim/step.h"

#include "../common/dtype.cuh"
#include "tuning.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <type_traits>

namespace lightkit::cuda::optim {

template <typename Options>
struct StepBatch {
  struct Entry {
    StepTensor<Options> tensor;
    int first_chunk;
  };
  Entry entries[kTensorsPerLaunch];
  int tensors;
  int64_t chunk;
  Options options;
  static_assert(sizeof(Entry) * kTensorsPerLaunch + sizeof(Options) + 64 <= kMaxArgumentBytes);
};

// Rounds to BFloat16 up or down at random, with the bits of cpu::optim::round_stochastically.
__device__ __forceinline__ __nv_bfloat16 round_stochastically(float value, uint64_t key, uint64_t index) {
  auto x = static_cast<unsigned>(index) ^ static_cast<unsigned>(key);
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= static_cast<unsigned>(index >> 32) ^ static_cast<unsigned>(key >> 32);
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  x ^= x >> 15;
  const unsigned bits = __float_as_uint(value);
  const unsigned raised = (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + (x & 0xffffu);
  return __ushort_as_bfloat16(static_cast<unsigned short>(raised >> 16));
}

template <typename T, int width>
__device__ __forceinline__ Pack<T, width> load(const void* memory, int64_t i) {
  return *reinterpret_cast<const Pack<T, width>*>(static_cast<const T*>(memory) + i);
}

template <typename T, int width>
__device__ __forceinline__ void store(void* memory, int64_t i, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(static_cast<T*>(memory) + i) = pack;
}

// Updates the elements [i, i + width). The states are of type state_t; `extras` are master weights, averages and
// stochastic rounding.
template <typename Rule, typename scalar_t, typename state_t, bool extras, int width>
__device__ __forceinline__ void update_elements(
    const StepTensor<typename Rule::Options>& tensor, const Rule& rule, typename Rule::acc_t share, int64_t i) {
  using acc_t = typename Rule::acc_t;
  constexpr int kStates = static_cast<int>(Rule::Options::kStates);
  auto parameter = load<scalar_t, width>(tensor.parameter, i);
  const auto gradient = load<scalar_t, width>(tensor.gradient, i);
  Pack<state_t, width> states[kStates]{};
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    if (tensor.states[s] != nullptr && !tensor.first) {
      states[s] = load<state_t, width>(tensor.states[s], i);
    }
  }
  Pack<float, width> master{};
  Pack<acc_t, width> average{};
  if constexpr (extras) {
    if (tensor.master != nullptr) {
      master = load<float, width>(tensor.master, i);
    }
    if (tensor.average != nullptr && !tensor.first_average) {
      average = load<acc_t, width>(tensor.average, i);
    }
  }
#pragma unroll
  for (int k = 0; k < width; ++k) {
    auto value = widen<acc_t>(parameter.values[k]);
    if constexpr (extras) {
      // A parameter that is not the rounding of its master weight was written by others since the last step.
      if (tensor.master != nullptr && widen<acc_t>(narrow<scalar_t>(master.values[k])) == value) {
        value = master.values[k];
      }
    }
    acc_t held[kStates];
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      held[s] = widen<acc_t>(states[s].values[k]);
    }
    rule.update(value, widen<acc_t>(gradient.values[k]), held, tensor);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      states[s].values[k] = narrow<state_t>(held[s]);
    }
    parameter.values[k] = narrow<scalar_t>(value);
    if constexpr (extras) {
      if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
        if (tensor.stochastic) {
          parameter.values[k] = round_stochastically(value, tensor.key, static_cast<uint64_t>(i + k));
        }
      }
      master.values[k] = static_cast<float>(value);
      // Without a master weight, the average is of the rounded parameter.
      const acc_t current = tensor.master != nullptr ? value : widen<acc_t>(parameter.values[k]);
      const acc_t old = tensor.first_average ? current : average.values[k];
      average.values[k] = old + share * (current - old);
    }
  }
  store(tensor.parameter, i, parameter);
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    if (tensor.states[s] != nullptr) {
      store(tensor.states[s], i, states[s]);
    }
  }
  if constexpr (extras) {
    if (tensor.master != nullptr) {
      store(tensor.master, i, master);
    }
    if (tensor.average != nullptr) {
      store(tensor.average, i, average);
    }
  }
}

template <typename Options>
__device__ __forceinline__ bool are_aligned(const StepTensor<Options>& tensor) {
  bool aligned = is_aligned(tensor.parameter) && is_aligned(tensor.gradient) && is_aligned(tensor.master) &&
      is_aligned(tensor.average);
  for (const void* state : tensor.states) {
    aligned = aligned && is_aligned(state);
  }
  return aligned;
}

// Returns the factor of the gradients from clipping and loss scaling; NaN if the norm is NaN.
__device__ __forceinline__ double gradient_factor(const StepOptions& options) {
  double factor = options.maximize ? -options.gradient_factor : options.gradient_factor;
  if (options.scale_on_device != nullptr) {
    factor /= *options.scale_on_device;
  }
  if (options.norm_on_device != nullptr) {
    const double clip = options.max_norm / (*options.norm_on_device + 1e-6);
    factor *= clip > 1 ? 1 : clip;
  }
  return factor;
}

template <typename Rule, typename scalar_t, typename state_t, bool extras>
__global__ void __launch_bounds__(kStepThreads)
    step_kernel(const __grid_constant__ StepBatch<typename Rule::Options> batch) {
  constexpr int width = Pack<scalar_t>::size;
  const auto& options = batch.options;
  if (options.skip_on_device != nullptr && *options.skip_on_device != 0) {
    return;
  }
  const int chunk = static_cast<int>(blockIdx.x);
  int low = 0, high = batch.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  const auto& tensor = batch.entries[low].tensor;

  // Powers, roots and quotients are computed once a block.
  __shared__ Rule shared;
  if (threadIdx.x == 0) {
    const double lr = options.lr_on_device == nullptr ? options.lr : *options.lr_on_device;
    const double count = tensor.count_on_device == nullptr ? tensor.count : *tensor.count_on_device;
    shared = Rule::make(options, lr, gradient_factor(options), count);
  }
  __syncthreads();
  const Rule rule = shared;
  const auto share = static_cast<typename Rule::acc_t>(1 - options.ema_decay);

  const int64_t begin = static_cast<int64_t>(chunk - batch.entries[low].first_chunk) * batch.chunk;
  const int64_t end = min(begin + batch.chunk, tensor.numel);
  int64_t packed_end = begin;
  if (are_aligned(tensor)) {
    // Chunks are multiples of a pack: only the last chunk of a parameter has a rest.
    packed_end = begin + (end - begin) / width * width;
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * width; i < packed_end; i += kStepThreads * width) {
      update_elements<Rule, scalar_t, state_t, extras, width>(tensor, rule, share, i);
    }
  }
  for (int64_t i = packed_end + threadIdx.x; i < end; i += kStepThreads) {
    update_elements<Rule, scalar_t, state_t, extras, 1>(tensor, rule, share, i);
  }
}

// The parameters of one launch have the same types of parameter and states, the same options, and all extras or none.
template <typename Options>
struct Kind {
  ElementType type;
  const Options* options;
  bool wide;
  bool extras;

  explicit Kind(const StepTensor<Options>& tensor)
      : type(tensor.type),
        options(tensor.options),
        wide(tensor.master != nullptr),
        extras(tensor.master != nullptr || tensor.average != nullptr || tensor.stochastic) {}

  bool operator<(const Kind& other) const {
    return std::tie(type, options, wide, extras) < std::tie(other.type, other.options, other.wide, other.extras);
  }
};

template <typename Rule, typename scalar_t, typename state_t>
cudaError_t launch_typed(const StepBatch<typename Rule::Options>& batch, bool extras, int blocks, cudaStream_t stream) {
  if (extras) {
    constexpr auto kernel = step_kernel<Rule, scalar_t, state_t, true>;
    kernel<<<blocks, kStepThreads, 0, stream>>>(batch);
  } else {
    constexpr auto kernel = step_kernel<Rule, scalar_t, state_t, false>;
    kernel<<<blocks, kStepThreads, 0, stream>>>(batch);
  }
  return cudaGetLastError();
}

// Calls function(scalar_t{}) with the element type of a parameter.
template <typename Function>
cudaError_t with_type(ElementType type, const Function& function) {
  switch (type) {
    case ElementType::Float:
      return function(float{});
    case ElementType::Double:
      return function(double{});
    case ElementType::BFloat16:
      return function(__nv_bfloat16{});
    case ElementType::Half:
      return function(__half{});
  }
  return cudaErrorInvalidValue;
}

// Calls launch(batch, kind, blocks) until every parameter is updated.
template <typename Options, typename Launch>
cudaError_t for_each_batch(const std::vector<StepTensor<Options>>& tensors, const Launch& launch) {
  std::map<Kind<Options>, std::vector<const StepTensor<Options>*>> kinds;
  for (const auto& tensor : tensors) {
    if (tensor.numel > 0) {
      kinds[Kind<Options>(tensor)].push_back(&tensor);
    }
  }
  for (const auto& [kind, members] : kinds) {
    for (size_t start = 0; start < members.size(); start += kTensorsPerLaunch) {
      const int count = static_cast<int>(std::min<size_t>(kTensorsPerLaunch, members.size() - start));
      int64_t elements = 0;
      for (int i = 0; i < count; ++i) {
        elements += members[start + i]->numel;
      }
      StepBatch<Options> batch{};
      batch.options = *kind.options;
      batch.tensors = count;
      const int64_t share = round_up(elements / kWantedBlocks, kSmallestChunk);
      batch.chunk = std::clamp(share, kSmallestChunk, kLargestChunk);
      int blocks = 0;
      for (int i = 0; i < count; ++i) {
        batch.entries[i] = {*members[start + i], blocks};
        blocks += static_cast<int>(ceil_div(members[start + i]->numel, batch.chunk));
      }
      if (const auto error = launch(batch, kind, blocks); error != cudaSuccess) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace lightkit::cuda::optim
