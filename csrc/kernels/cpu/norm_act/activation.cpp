// Activation functions and their derivatives, a vector at a time: the same formulas as torch's, whose functions of a
// vector they use, except that a logistic function takes the faster exp of softmax.

#include "activation.h"

#include "../common/logistic.h"
#include "../common/simd.h"

#include <cmath>
#include <numbers>

namespace lightkit::cpu::norm_act {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Returns `yes` in the lanes where a comparison was true.
template <typename T>
Vec<T> select(const Vec<T>& condition, const Vec<T>& yes, const Vec<T>& no) {
  return Vec<T>::blendv(no, yes, condition);
}

// Each function has `value(x)` and `derivative(x)`.

template <typename T>
struct LeakyRelu {
  Vec<T> slope;
  explicit LeakyRelu(const Activation& a) : slope(static_cast<T>(a.alpha)) {}
  Vec<T> value(const Vec<T>& x) const {
    return select(x > Vec<T>(0), x, x * slope);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    return select(x > Vec<T>(0), Vec<T>(1), slope);
  }
};

template <typename T>
struct Hardtanh {
  Vec<T> least, most;
  explicit Hardtanh(const Activation& a) : least(static_cast<T>(a.alpha)), most(static_cast<T>(a.beta)) {}
  Vec<T> value(const Vec<T>& x) const {
    return at::vec::clamp(x, least, most);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    return select((x <= least) | (x >= most), Vec<T>(0), Vec<T>(1));
  }
};

template <typename T>
struct Elu {
  Vec<T> alpha;
  explicit Elu(const Activation& a) : alpha(static_cast<T>(a.alpha)) {}
  Vec<T> value(const Vec<T>& x) const {
    return select(x > Vec<T>(0), x, x.expm1() * alpha);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    // NaN has the derivative 1, as in torch.
    return select(x <= Vec<T>(0), alpha * exp_bounded(at::vec::clamp_max(x, Vec<T>(0))), Vec<T>(1));
  }
};

template <typename T>
struct Silu {
  explicit Silu(const Activation&) {}
  Vec<T> value(const Vec<T>& x) const {
    return x * logistic(x);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const auto s = logistic(x);
    return s * (Vec<T>(1) + x * (Vec<T>(1) - s));
  }
};

template <typename T>
struct Gelu {
  explicit Gelu(const Activation&) {}
  static Vec<T> cdf(const Vec<T>& x) {
    return Vec<T>(0.5) * (Vec<T>(1) + (x * Vec<T>(static_cast<T>(1 / std::numbers::sqrt2))).erf());
  }
  Vec<T> value(const Vec<T>& x) const {
    return x * cdf(x);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const Vec<T> density(static_cast<T>(std::numbers::inv_sqrtpi / std::numbers::sqrt2));
    return cdf(x) + x * density * exp_bounded(x * x * Vec<T>(-0.5));
  }
};

// x * (1 + tanh(z)) / 2 is x / (1 + exp(-2 z)), where z is a polynomial of x.
template <typename T>
struct GeluTanh {
  explicit GeluTanh(const Activation&) {}
  static constexpr T linear = 2 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi;
  static constexpr T cubic = linear * 0.044715;
  static Vec<T> share(const Vec<T>& x) {
    return logistic(x * at::vec::fmadd(Vec<T>(cubic), x * x, Vec<T>(linear)));
  }
  Vec<T> value(const Vec<T>& x) const {
    return x * share(x);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const auto s = share(x);
    const auto slope = at::vec::fmadd(Vec<T>(3 * cubic), x * x, Vec<T>(linear));
    return s * (Vec<T>(1) + x * slope * (Vec<T>(1) - s));
  }
};

template <typename T>
struct Hardsigmoid {
  explicit Hardsigmoid(const Activation&) {}
  Vec<T> value(const Vec<T>& x) const {
    return at::vec::clamp(x + Vec<T>(3), Vec<T>(0), Vec<T>(6)) / Vec<T>(6);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    return select((x > Vec<T>(-3)) & (x < Vec<T>(3)), Vec<T>(static_cast<T>(1.0 / 6)), Vec<T>(0));
  }
};

template <typename T>
struct Hardswish {
  explicit Hardswish(const Activation&) {}
  Vec<T> value(const Vec<T>& x) const {
    return x * at::vec::clamp(x + Vec<T>(3), Vec<T>(0), Vec<T>(6)) / Vec<T>(6);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const auto between = x / Vec<T>(3) + Vec<T>(0.5);
    return select(x <= Vec<T>(-3), Vec<T>(0), select(x < Vec<T>(3), between, Vec<T>(1)));
  }
};

template <typename T>
struct Tanh {
  explicit Tanh(const Activation&) {}
  Vec<T> value(const Vec<T>& x) const {
    return x.tanh();
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const auto y = x.tanh();
    return Vec<T>(1) - y * y;
  }
};

template <typename T>
struct Sigmoid {
  explicit Sigmoid(const Activation&) {}
  Vec<T> value(const Vec<T>& x) const {
    return logistic(x);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const auto y = logistic(x);
    return y * (Vec<T>(1) - y);
  }
};

template <typename T>
struct Softplus {
  Vec<T> beta, threshold;
  explicit Softplus(const Activation& a) : beta(static_cast<T>(a.alpha)), threshold(static_cast<T>(a.beta)) {}
  Vec<T> value(const Vec<T>& x) const {
    const auto z = x * beta;
    return select(z > threshold, x, z.exp().log1p() / beta);
  }
  Vec<T> derivative(const Vec<T>& x) const {
    const auto z = x * beta;
    return select(z > threshold, Vec<T>(1), logistic(z));
  }
};

// Calls use(function) with the function of a kind: one loop over many values for each.
template <typename T, typename Use>
void with_function(const Activation& activation, const Use& use) {
  switch (activation.kind) {
    case Kind::LeakyRelu:
      return use(LeakyRelu<T>(activation));
    case Kind::Hardtanh:
      return use(Hardtanh<T>(activation));
    case Kind::Elu:
      return use(Elu<T>(activation));
    case Kind::Silu:
      return use(Silu<T>(activation));
    case Kind::Gelu:
      return use(Gelu<T>(activation));
    case Kind::GeluTanh:
      return use(GeluTanh<T>(activation));
    case Kind::Hardswish:
      return use(Hardswish<T>(activation));
    case Kind::Hardsigmoid:
      return use(Hardsigmoid<T>(activation));
    case Kind::Tanh:
      return use(Tanh<T>(activation));
    case Kind::Sigmoid:
      return use(Sigmoid<T>(activation));
    case Kind::Softplus:
      return use(Softplus<T>(activation));
    case Kind::None:
    case Kind::Relu:
      return;
  }
}

}  // namespace

template <typename T>
void activate(const Activation& activation, T* values, int64_t count) {
  with_function<T>(activation, [&](const auto& function) {
    int64_t i = 0;
    for (; i + Vec<T>::size() <= count; i += Vec<T>::size()) {
      function.value(Vec<T>::loadu(values + i)).store(values + i);
    }
    if (i < count) {
      function.value(Vec<T>::loadu(values + i, count - i)).store(values + i, static_cast<int>(count - i));
    }
  });
}

template <typename T>
void differentiate(const Activation& activation, const T* values, const T* upstream, T* gradient, int64_t count) {
  with_function<T>(activation, [&](const auto& function) {
    int64_t i = 0;
    for (; i + Vec<T>::size() <= count; i += Vec<T>::size()) {
      (Vec<T>::loadu(upstream + i) * function.derivative(Vec<T>::loadu(values + i))).store(gradient + i);
    }
    if (i < count) {
      const auto slope = function.derivative(Vec<T>::loadu(values + i, count - i));
      (Vec<T>::loadu(upstream + i, count - i) * slope).store(gradient + i, static_cast<int>(count - i));
    }
  });
}

template void activate(const Activation&, float*, int64_t);
template void activate(const Activation&, double*, int64_t);
template void differentiate(const Activation&, const float*, const float*, float*, int64_t);
template void differentiate(const Activation&, const double*, const double*, double*, int64_t);

}  // namespace lightkit::cpu::norm_act
