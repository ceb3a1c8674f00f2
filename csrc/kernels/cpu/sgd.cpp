#include "../sgd.h"

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

namespace lightkit::cpu {
namespace {

using at::vec::Vectorized;

// A thread is woken for at least this many elements.
constexpr int64_t kGrain = 32768;

// Threads meet only at multiples of this many elements of a tensor, so that no cache line has two writers.
constexpr int64_t kAlignment = 64;

template <typename acc_t>
acc_t signed_factor(const SgdOptions& options) {
  return static_cast<acc_t>(options.maximize ? -options.gradient_factor : options.gradient_factor);
}

enum class Momentum { None, First, Plain, Nesterov, FirstNesterov };

// The update of one run of elements. Which terms exist is fixed at compile time: a term that is off must not
// turn an infinite parameter or an unwritten momentum buffer into NaN through a product with 0.
template <typename scalar_t, Momentum kind, bool decay>
void update(const SgdTensor& tensor, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  auto* parameter = static_cast<scalar_t*>(tensor.parameter);
  const auto* gradient = static_cast<const scalar_t*>(tensor.gradient);
  auto* buffer = static_cast<scalar_t*>(tensor.momentum);
  const SgdOptions& options = *tensor.options;
  const Vec factor(signed_factor<acc_t>(options));
  const Vec weight_decay(static_cast<acc_t>(options.weight_decay));
  const Vec momentum(static_cast<acc_t>(options.momentum));
  const Vec intake(static_cast<acc_t>(1 - options.dampening));
  const Vec negative_lr(static_cast<acc_t>(-options.lr));

  const auto step = [&](int64_t i, int64_t count) {
    auto p = Pack<scalar_t>::load(parameter + i, count);
    const auto g = Pack<scalar_t>::load(gradient + i, count);
    Pack<scalar_t> m;
    if constexpr (kind == Momentum::Plain || kind == Momentum::Nesterov) {
      m = Pack<scalar_t>::load(buffer + i, count);
    }
    for (int k = 0; k < Pack<scalar_t>::parts; ++k) {
      Vec direction = g.part[k] * factor;
      if constexpr (decay) {
        direction = at::vec::fmadd(weight_decay, p.part[k], direction);
      }
      if constexpr (kind == Momentum::First || kind == Momentum::FirstNesterov) {
        m.part[k] = direction;
      } else if constexpr (kind != Momentum::None) {
        m.part[k] = at::vec::fmadd(momentum, m.part[k], intake * direction);
      }
      if constexpr (kind == Momentum::Nesterov || kind == Momentum::FirstNesterov) {
        direction = at::vec::fmadd(momentum, m.part[k], direction);
      } else if constexpr (kind != Momentum::None) {
        direction = m.part[k];
      }
      p.part[k] = at::vec::fmadd(negative_lr, direction, p.part[k]);
    }
    p.store(parameter + i, count);
    if constexpr (kind != Momentum::None) {
      m.store(buffer + i, count);
    }
  };

  constexpr int64_t size = Pack<scalar_t>::size;
  int64_t i = begin;
  for (; i + size <= end; i += size) {
    step(i, size);
  }
  if (i < end) {
    step(i, end - i);
  }
}

// `values`, rounded to BFloat16 up or down with the probabilities that make the expected result exact: 16 random
// bits are added below the last bit that stays. The bits are a hash of the key and the element's index, so that
// neither threads nor blocks change them. (The mixer is C. Wellons's lowbias32, with the constants of
// his prospector.)
void round_stochastically(const float* values, at::BFloat16* out, int64_t count, uint64_t key, int64_t first_index) {
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<uint64_t>(first_index + i);
    uint32_t x = static_cast<uint32_t>(index) ^ static_cast<uint32_t>(key);
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    // What lies beyond 32 bits of the index and the key changes the second round.
    x ^= static_cast<uint32_t>(index >> 32) ^ static_cast<uint32_t>(key >> 32);
    x = (x ^ (x >> 15)) * 0x735a2d97u;
    x ^= x >> 15;
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    // Infinity and NaN stay what they are.
    const uint32_t raised = (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + (x & 0xffffu);
    out[i].x = static_cast<uint16_t>(raised >> 16);
  }
}

// The update of ../sgd.h in full, for what is more than plain SGD: looked up at run time, block by block.
template <typename scalar_t>
void update_with_extras(const SgdTensor& tensor, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kBlock = 256;
  const SgdOptions& options = *tensor.options;
  auto* parameter = static_cast<scalar_t*>(tensor.parameter);
  const auto* gradient = static_cast<const scalar_t*>(tensor.gradient);
  auto* average = static_cast<acc_t*>(tensor.average);
  const bool wide_momentum = tensor.master != nullptr;
  const Vec momentum(static_cast<acc_t>(options.momentum));
  const Vec intake(static_cast<acc_t>(1 - options.dampening));
  alignas(64) acc_t p[kBlock], g[kBlock], m[kBlock];

  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    if (tensor.master != nullptr) {
      at::vec::convert(tensor.master + start, p, count);
    } else {
      at::vec::convert(parameter + start, p, count);
    }
    at::vec::convert(gradient + start, g, count);
    if (tensor.momentum != nullptr && !tensor.first) {
      if (wide_momentum) {
        at::vec::convert(static_cast<const float*>(tensor.momentum) + start, m, count);
      } else {
        at::vec::convert(static_cast<const scalar_t*>(tensor.momentum) + start, m, count);
      }
    }
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::size(), count - i));
      const Vec value = Vec::loadu(p + i, n);
      Vec direction = Vec::loadu(g + i, n) * Vec(signed_factor<acc_t>(options));
      if (options.weight_decay != 0) {
        direction = at::vec::fmadd(Vec(static_cast<acc_t>(options.weight_decay)), value, direction);
      }
      if (tensor.momentum != nullptr) {
        const Vec buffer =
            tensor.first ? direction : at::vec::fmadd(momentum, Vec::loadu(m + i, n), intake * direction);
        buffer.store(m + i, n);
        direction = options.nesterov ? at::vec::fmadd(momentum, buffer, direction) : buffer;
      }
      at::vec::fmadd(Vec(static_cast<acc_t>(-options.lr)), direction, value).store(p + i, n);
    }
    if (tensor.momentum != nullptr) {
      if (wide_momentum) {
        at::vec::convert(m, static_cast<float*>(tensor.momentum) + start, count);
      } else {
        at::vec::convert(m, static_cast<scalar_t*>(tensor.momentum) + start, count);
      }
    }
    bool rounded = false;
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      if (tensor.stochastic) {
        round_stochastically(p, parameter + start, count, tensor.key, start);
        rounded = true;
      }
    }
    if (!rounded) {
      at::vec::convert(p, parameter + start, count);
    }
    if (tensor.master != nullptr) {
      at::vec::convert(p, tensor.master + start, count);
    } else if (average != nullptr) {
      // What is averaged are the parameters as they are.
      at::vec::convert(parameter + start, p, count);
    }
    if (average != nullptr) {
      const Vec share(static_cast<acc_t>(1 - options.ema_decay));
      for (int64_t i = 0; i < count; i += Vec::size()) {
        const int n = static_cast<int>(std::min<int64_t>(Vec::size(), count - i));
        const Vec value = Vec::loadu(p + i, n);
        const Vec old = tensor.first_average ? value : Vec::loadu(average + start + i, n);
        at::vec::fmadd(share, value - old, old).store(average + start + i, n);
      }
    }
  }
}

template <typename scalar_t, Momentum kind>
void update_with(const SgdTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.options->weight_decay != 0) {
    update<scalar_t, kind, true>(tensor, begin, end);
  } else {
    update<scalar_t, kind, false>(tensor, begin, end);
  }
}

template <typename scalar_t>
void update_as(const SgdTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.master != nullptr || tensor.average != nullptr || tensor.stochastic) {
    update_with_extras<scalar_t>(tensor, begin, end);
  } else if (tensor.momentum == nullptr) {
    update_with<scalar_t, Momentum::None>(tensor, begin, end);
  } else if (tensor.options->nesterov) {
    tensor.first ? update_with<scalar_t, Momentum::FirstNesterov>(tensor, begin, end)
                 : update_with<scalar_t, Momentum::Nesterov>(tensor, begin, end);
  } else {
    tensor.first ? update_with<scalar_t, Momentum::First>(tensor, begin, end)
                 : update_with<scalar_t, Momentum::Plain>(tensor, begin, end);
  }
}

void update_range(const SgdTensor& tensor, int64_t begin, int64_t end) {
  switch (tensor.type) {
    case SgdType::Float:
      return update_as<float>(tensor, begin, end);
    case SgdType::Double:
      return update_as<double>(tensor, begin, end);
    case SgdType::BFloat16:
      return update_as<at::BFloat16>(tensor, begin, end);
    case SgdType::Half:
      return update_as<at::Half>(tensor, begin, end);
  }
}

// The sum of the squares of some elements, in double.
template <typename scalar_t>
double square_sum(const scalar_t* values, int64_t count) {
  constexpr int64_t lanes = 8;
  constexpr int64_t kBlock = 512;
  alignas(64) accumulator_t<scalar_t> block[kBlock];
  double sums[lanes] = {};
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t n = std::min(kBlock, count - start);
    const auto* x = as_accumulators(values + start, n, block);
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      for (int64_t k = 0; k < lanes; ++k) {
        sums[k] += static_cast<double>(x[i + k]) * static_cast<double>(x[i + k]);
      }
    }
    for (; i < n; ++i) {
      sums[i % lanes] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
  }
  return std::accumulate(sums, sums + lanes, 0.0);
}

double square_sum(const SgdTensor& tensor, int64_t begin, int64_t end) {
  switch (tensor.type) {
    case SgdType::Float:
      return square_sum(static_cast<const float*>(tensor.gradient) + begin, end - begin);
    case SgdType::Double:
      return square_sum(static_cast<const double*>(tensor.gradient) + begin, end - begin);
    case SgdType::BFloat16:
      return square_sum(static_cast<const at::BFloat16*>(tensor.gradient) + begin, end - begin);
    case SgdType::Half:
      return square_sum(static_cast<const at::Half*>(tensor.gradient) + begin, end - begin);
  }
  return 0;
}

// Tensors laid end to end in runs of some elements; starts[i] is the first run of tensor i.
std::vector<int64_t> starts_of_runs(const std::vector<SgdTensor>& tensors, int64_t run) {
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    starts[i + 1] = starts[i] + (tensors[i].numel + run - 1) / run;
  }
  return starts;
}

// The tensor that a run is of.
size_t tensor_of(const std::vector<int64_t>& starts, int64_t run) {
  return std::upper_bound(starts.begin(), starts.end(), run) - starts.begin() - 1;
}

}  // namespace

double gradient_square_sum(const std::vector<SgdTensor>& tensors) {
  // One sum for each run of a tensor, whoever computes it, added in their order.
  constexpr int64_t kRun = 16384;
  const auto starts = starts_of_runs(tensors, kRun);
  std::vector<double> sums(starts.back());
  at::parallel_for(0, starts.back(), kGrain / kRun, [&](int64_t begin, int64_t end) {
    size_t i = begin < end ? tensor_of(starts, begin) : 0;
    for (int64_t run = begin; run < end; ++run) {
      while (starts[i + 1] <= run) {
        ++i;
      }
      const int64_t from = (run - starts[i]) * kRun;
      sums[run] = square_sum(tensors[i], from, std::min(from + kRun, tensors[i].numel));
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void sgd(const std::vector<SgdTensor>& tensors) {
  const auto starts = starts_of_runs(tensors, kAlignment);
  at::parallel_for(0, starts.back(), kGrain / kAlignment, [&](int64_t begin, int64_t end) {
    size_t i = tensor_of(starts, begin);
    for (; i < tensors.size() && starts[i] < end; ++i) {
      const int64_t from = std::max<int64_t>(begin - starts[i], 0) * kAlignment;
      const int64_t to = std::min((end - starts[i]) * kAlignment, tensors[i].numel);
      if (from < to) {
        update_range(tensors[i], from, to);
      }
    }
  });
}

}  // namespace lightkit::cpu
