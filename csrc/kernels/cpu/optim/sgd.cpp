#include "../../optim/sgd.h"

#include "step.h"
#include "tuning.h"

namespace lightkit::cpu::optim {
namespace {

using at::vec::Vectorized;

enum class Momentum { None, First, Plain, Nesterov, FirstNesterov };

// The update of the elements [begin, end). The terms are fixed at compile time: a product with 0 would make NaN of an
// infinite parameter or of an uninitialised momentum buffer.
template <typename scalar_t, Momentum kind, bool decay>
void update(const SgdTensor& tensor, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  auto* parameter = static_cast<scalar_t*>(tensor.parameter);
  const auto* gradient = static_cast<const scalar_t*>(tensor.gradient);
  auto* buffer = static_cast<scalar_t*>(tensor.states[0]);
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

// The full update of kernels/optim/sgd.h, with master weights, averages and stochastic rounding; terms are chosen at
// run time, block by block.
template <typename scalar_t>
void update_with_extras(const SgdTensor& tensor, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  const SgdOptions& options = *tensor.options;
  auto* parameter = static_cast<scalar_t*>(tensor.parameter);
  const auto* gradient = static_cast<const scalar_t*>(tensor.gradient);
  void* const buffer = tensor.states[0];
  const bool wide_momentum = tensor.master != nullptr;
  const Vec momentum(static_cast<acc_t>(options.momentum));
  const Vec intake(static_cast<acc_t>(1 - options.dampening));
  alignas(64) acc_t p[kSgdBlock], g[kSgdBlock], m[kSgdBlock];

  for (int64_t start = begin; start < end; start += kSgdBlock) {
    const int64_t count = std::min(kSgdBlock, end - start);
    if (tensor.master == nullptr) {
      at::vec::convert(parameter + start, p, count);
    } else if constexpr (is_half<scalar_t>) {
      refresh_master<scalar_t>(tensor, start, count);
      std::copy_n(tensor.master + start, count, p);
    }
    at::vec::convert(gradient + start, g, count);
    if (buffer != nullptr && !tensor.first) {
      if (wide_momentum) {
        at::vec::convert(static_cast<const float*>(buffer) + start, m, count);
      } else {
        at::vec::convert(static_cast<const scalar_t*>(buffer) + start, m, count);
      }
    }
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::size(), count - i));
      const Vec value = Vec::loadu(p + i, n);
      Vec direction = Vec::loadu(g + i, n) * Vec(signed_factor<acc_t>(options));
      if (options.weight_decay != 0) {
        direction = at::vec::fmadd(Vec(static_cast<acc_t>(options.weight_decay)), value, direction);
      }
      if (buffer != nullptr) {
        const Vec moved = tensor.first ? direction : at::vec::fmadd(momentum, Vec::loadu(m + i, n), intake * direction);
        moved.store(m + i, n);
        direction = options.nesterov ? at::vec::fmadd(momentum, moved, direction) : moved;
      }
      at::vec::fmadd(Vec(static_cast<acc_t>(-options.lr)), direction, value).store(p + i, n);
    }
    if (buffer != nullptr) {
      if (wide_momentum) {
        at::vec::convert(m, static_cast<float*>(buffer) + start, count);
      } else {
        at::vec::convert(m, static_cast<scalar_t*>(buffer) + start, count);
      }
    }
    store<scalar_t>(tensor, start, count, p);
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
  } else if (tensor.states[0] == nullptr) {
    update_with<scalar_t, Momentum::None>(tensor, begin, end);
  } else if (tensor.options->nesterov) {
    tensor.first ? update_with<scalar_t, Momentum::FirstNesterov>(tensor, begin, end)
                 : update_with<scalar_t, Momentum::Nesterov>(tensor, begin, end);
  } else {
    tensor.first ? update_with<scalar_t, Momentum::First>(tensor, begin, end)
                 : update_with<scalar_t, Momentum::Plain>(tensor, begin, end);
  }
}

template <typename scalar_t>
void update_masked(const SgdTensor& tensor, int64_t begin, int64_t end) {
  const int64_t block = tensor.mask == nullptr ? end - begin : kMaskBlock;
  for (int64_t start = begin; start < end; start += block) {
    const int64_t count = std::min(block, end - start);
    update_as<scalar_t>(tensor, start, start + count);
    apply_mask<scalar_t>(tensor, start, count);
  }
}

}  // namespace

void sgd(const std::vector<SgdTensor>& tensors) {
  for_each_range(tensors, [](const SgdTensor& tensor, int64_t begin, int64_t end) {
    with_type(tensor.type, [&](auto scalar) { update_masked<decltype(scalar)>(tensor, begin, end); });
  });
}

}  // namespace lightkit::cpu::optim
