// How the steps of all optimizers walk over the tensors of a model on a CPU.
#pragma once

#include "../../step.h"

#include "../parallel.h"
#include "../simd.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace lightkit::cpu {

// A thread is woken for at least this many elements.
inline constexpr int64_t kStepGrain = 32768;

// Tensors laid end to end in runs of some elements; starts[i] is the first run of tensor i.
template <typename Tensor>
std::vector<int64_t> starts_of_runs(const std::vector<Tensor>& tensors, int64_t run) {
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    starts[i + 1] = starts[i] + (tensors[i].numel + run - 1) / run;
  }
  return starts;
}

// The tensor that a run is of.
inline size_t tensor_of(const std::vector<int64_t>& starts, int64_t run) {
  return std::upper_bound(starts.begin(), starts.end(), run) - starts.begin() - 1;
}

// While it lives, this thread counts numbers below the smallest normal one as 0, in float and double. The running means
// of a parameter that gets no gradient, such as one of a dead unit, shrink until they are such numbers, with which a
// processor is some ten times slower.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushResults | kFlushOperands); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushResults = 0x8000;
  static constexpr unsigned kFlushOperands = 0x0040;
  unsigned before_;
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// Calls update(tensor, begin, end) for ranges that together make up all tensors, shared out evenly over threads.
template <typename Tensor, typename Update>
void for_each_range(const std::vector<Tensor>& tensors, const Update& update) {
  // Threads meet only at multiples of this many elements of a tensor, so that no cache line has two writers.
  constexpr int64_t kAlignment = 64;
  const auto starts = starts_of_runs(tensors, kAlignment);
  parallel_for(0, starts.back(), kStepGrain / kAlignment, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (size_t i = tensor_of(starts, begin); i < tensors.size() && starts[i] < end; ++i) {
      const int64_t from = std::max<int64_t>(begin - starts[i], 0) * kAlignment;
      const int64_t to = std::min((end - starts[i]) * kAlignment, tensors[i].numel);
      if (from < to) {
        update(tensors[i], from, to);
      }
    }
  });
}

// Calls function(scalar_t{}) with the type that a parameter has.
template <typename Function>
auto with_type(ParameterType type, const Function& function) {
  switch (type) {
    case ParameterType::Double:
      return function(double{});
    case ParameterType::BFloat16:
      return function(at::BFloat16{});
    case ParameterType::Half:
      return function(at::Half{});
    default:
      return function(float{});
  }
}

template <typename acc_t>
acc_t signed_factor(const StepOptions& options) {
  return static_cast<acc_t>(options.maximize ? -options.gradient_factor : options.gradient_factor);
}

// `values`, rounded to BFloat16 up or down with the probabilities that make the expected result exact: 16 random
// bits are added below the last bit that stays. The bits are a hash of the key and the element's index, so that
// neither threads nor blocks change them.
void round_stochastically(const float* values, at::BFloat16* out, int64_t count, uint64_t key, int64_t first_index);

// Takes into a master weight what others have written into its parameter since the last step: where the parameter is
// no longer its rounding.
template <typename scalar_t, typename Options>
void refresh_master(const StepTensor<Options>& tensor, int64_t start, int64_t count) {
  constexpr int64_t kBlock = 256;
  scalar_t rounded[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = std::min(kBlock, count - i);
    const auto* parameter = static_cast<const scalar_t*>(tensor.parameter) + start + i;
    float* master = tensor.master + start + i;
    at::vec::convert(master, rounded, n);
    if (std::memcmp(rounded, parameter, n * sizeof(scalar_t)) != 0) {
      for (int64_t k = 0; k < n; ++k) {
        if (std::memcmp(rounded + k, parameter + k, sizeof(scalar_t)) != 0) {
          master[k] = static_cast<float>(parameter[k]);
        }
      }
    }
  }
}

// Writes new values of `count` elements of a parameter from `start` on: rounded, into its master weight, and into
// its average. `values` may be the parameter itself, where that has the accumulation type.
template <typename scalar_t, typename Options>
void store(const StepTensor<Options>& tensor, int64_t start, int64_t count, accumulator_t<scalar_t>* values) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  auto* parameter = static_cast<scalar_t*>(tensor.parameter) + start;
  if constexpr (is_half<scalar_t>) {
    bool rounded = false;
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      if (tensor.stochastic) {
        round_stochastically(values, parameter, count, tensor.key, start);
        rounded = true;
      }
    }
    if (!rounded) {
      at::vec::convert(values, parameter, count);
    }
    if (tensor.master != nullptr) {
      if (values != tensor.master + start) {
        std::copy_n(values, count, tensor.master + start);
      }
    } else if (tensor.average != nullptr) {
      // What is averaged are the parameters as they are.
      at::vec::convert(parameter, values, count);
    }
  } else if (values != parameter) {
    std::copy_n(values, count, parameter);
  }
  if (tensor.average != nullptr) {
    auto* average = static_cast<acc_t*>(tensor.average) + start;
    const Vec share(static_cast<acc_t>(1 - tensor.options->ema_decay));
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::size(), count - i));
      const Vec value = Vec::loadu(values + i, n);
      const Vec old = tensor.first_average ? value : Vec::loadu(average + i, n);
      at::vec::fmadd(share, value - old, old).store(average + i, n);
    }
  }
}

}  // namespace lightkit::cpu
