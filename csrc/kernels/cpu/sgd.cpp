#include "../sgd.h"

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace lightkit::cpu {
namespace {

using at::vec::Vectorized;

// A thread is woken for at least this many elements.
constexpr int64_t kGrain = 32768;

// Threads meet only at multiples of this many elements of a tensor, so that no cache line has two writers.
constexpr int64_t kAlignment = 64;

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
  const Vec sign(options.maximize ? acc_t(-1) : acc_t(1));
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
      Vec direction = g.part[k] * sign;
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
  if (tensor.momentum == nullptr) {
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

}  // namespace

void sgd(const std::vector<SgdTensor>& tensors) {
  // The tensors laid end to end in runs of kAlignment elements; starts[i] is the first run of tensor i.
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    starts[i + 1] = starts[i] + (tensors[i].numel + kAlignment - 1) / kAlignment;
  }
  at::parallel_for(0, starts.back(), kGrain / kAlignment, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
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
