// The walk of an optimizer's step over all parameters on a CPU, and the parts that all algorithms share.
#pragma once

#include "../../common/ceil_div.h"
#include "../../optim/step.h"

#include "../common/parallel.h"
#include "../common/simd.h"
#include "tuning.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace lightkit::cpu::optim {

// Numbers the runs of `run` elements of all tensors. starts[i] is the first run of tensor i.
template <typename Tensor>
std::vector<int64_t> starts_of_runs(const std::vector<Tensor>& tensors, int64_t run) {
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    starts[i + 1] = starts[i] + ceil_div(tensors[i].numel, run);
  }
  return starts;
}

// Returns the tensor that has a run.
inline size_t tensor_of(const std::vector<int64_t>& starts, int64_t run) {
  return std::upper_bound(starts.begin(), starts.end(), run) - starts.begin() - 1;
}

// Flushes subnormal numbers of this thread to 0 while it lives, in float and double. The running means of a parameter
// that gets no gradient, such as one of a dead unit, shrink until they are subnormal, and a processor is some ten times
// slower with such numbers.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ | kFlushResults | kFlushOperands);
  }
  ~FlushDenormals() {
    _mm_setcsr(before_);
  }

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

// Calls update(tensor, begin, end) for ranges that make up all tensors, shared evenly over the threads.
template <typename Tensor, typename Update>
void for_each_range(const std::vector<Tensor>& tensors, const Update& update) {
  const auto starts = starts_of_runs(tensors, kRangeMultiple);
  parallel_for(0, starts.back(), kElementsPerThread / kRangeMultiple, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (size_t i = tensor_of(starts, begin); i < tensors.size() && starts[i] < end; ++i) {
      const int64_t from = std::max<int64_t>(begin - starts[i], 0) * kRangeMultiple;
      const int64_t to = std::min((end - starts[i]) * kRangeMultiple, tensors[i].numel);
      if (from < to) {
        update(tensors[i], from, to);
      }
    }
  });
}

// Calls function(scalar_t{}) with the element type of a parameter.
template <typename Function>
auto with_type(ElementType type, const Function& function) {
  switch (type) {
    case ElementType::Double:
      return function(double{});
    case ElementType::BFloat16:
      return function(at::BFloat16{});
    case ElementType::Half:
      return function(at::Half{});
    default:
      return function(float{});
  }
}

template <typename acc_t>
acc_t signed_factor(const StepOptions& options) {
  return static_cast<acc_t>(options.maximize ? -options.gradient_factor : options.gradient_factor);
}

// Rounds to BFloat16 up or down with the probabilities that make the expected result exact: it adds 16 random bits
// below the last bit that stays. The bits are a hash of the key and the element's index, so that they depend on neither
// threads nor blocks.
void round_stochastically(
    const float* values,  // [count]
    at::BFloat16* out,    // [count]
    int64_t count,
    uint64_t key,
    int64_t first_index);

// Copies the elements of a parameter that are no longer the rounding of their master weight into the master weight:
// others have written to them since the last step.
template <typename scalar_t, typename Options>
void refresh_master(const StepTensor<Options>& tensor, int64_t start, int64_t count) {
  scalar_t rounded[kMasterBlock];
  for (int64_t i = 0; i < count; i += kMasterBlock) {
    const int64_t n = std::min(kMasterBlock, count - i);
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

// Writes `count` new elements from `start` on to a parameter, rounded, to its master weight, and to its average.
// `values` may be the parameter itself if that has the accumulation type.
template <typename scalar_t, typename Options>
void store(
    const StepTensor<Options>& tensor,
    int64_t start,
    int64_t count,
    accumulator_t<scalar_t>* values) {  // [count]
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
      // The average is of the rounded parameters.
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

// Sets the elements to 0 whose mask is 0, whatever they are; the other elements of `mask` are 1.
template <typename scalar_t>
void clear_masked(scalar_t* values, const uint8_t* mask, int64_t count) {
  // Compilers vectorise operations on integers, and no selection of numbers by bytes.
  using bits_t = std::
      conditional_t<sizeof(scalar_t) == 8, uint64_t, std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint16_t>>;
  static_assert(sizeof(bits_t) == sizeof(scalar_t));
  for (int64_t i = 0; i < count; ++i) {
    bits_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    bits &= static_cast<bits_t>(-static_cast<bits_t>(mask[i]));
    std::memcpy(static_cast<void*>(values + i), &bits, sizeof(bits));
  }
}

// Sets the masked elements of a parameter to 0, and those of its master weight and its average, right after their step:
// they are in the cache.
template <typename scalar_t, typename Options>
void apply_mask(const StepTensor<Options>& tensor, int64_t start, int64_t count) {
  if (tensor.mask == nullptr) {
    return;
  }
  const uint8_t* mask = tensor.mask + start;
  clear_masked(static_cast<scalar_t*>(tensor.parameter) + start, mask, count);
  if (tensor.master != nullptr) {
    clear_masked(tensor.master + start, mask, count);
  }
  if (tensor.average != nullptr) {
    clear_masked(static_cast<accumulator_t<scalar_t>*>(tensor.average) + start, mask, count);
  }
}

}  // namespace lightkit::cpu::optim
