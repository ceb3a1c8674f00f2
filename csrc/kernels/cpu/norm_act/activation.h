// Activation functions other than ReLU, which need the values before them for their derivative.
#pragma once

#include <cstdint>

namespace lightkit::cpu::norm_act {

// The functions are torch's of these names, with `alpha` and `beta` for their arguments in order. The values are part
// of the op's schema.
enum class Kind : int64_t {
  None,
  Relu,
  LeakyRelu,  // alpha: the slope
  Hardtanh,   // alpha: the least value, beta: the largest
  Elu,        // alpha
  Silu,
  Gelu,
  GeluTanh,  // the approximation by tanh
  Hardswish,
  Hardsigmoid,
  Tanh,
  Sigmoid,
  Softplus,  // alpha: torch's beta, beta: torch's threshold
  Last = Softplus,
};

struct Activation {
  Kind kind;
  double alpha;
  double beta;

  // True for a function whose derivative is computed from the values before it. That of a ReLU follows from a bit.
  bool is_general() const {
    return kind > Kind::Relu;
  }

  // True for a function that keeps the order of values, except that it may make some equal. Softplus falls a little
  // where torch replaces it by the identity.
  bool is_increasing() const {
    switch (kind) {
      case Kind::LeakyRelu:
      case Kind::Elu:
        return alpha >= 0;
      case Kind::Hardtanh:
        return alpha <= beta;
      default:
        return kind == Kind::Hardsigmoid || kind == Kind::Tanh || kind == Kind::Sigmoid;
    }
  }
};

// Replaces each value x by f(x), for a general function f.
template <typename T>
void activate(const Activation& activation, T* values, int64_t count);

// Computes gradient = upstream * f'(x) from the values x before the function; `gradient` may be `upstream` or `values`.
template <typename T>
void differentiate(const Activation& activation, const T* values, const T* upstream, T* gradient, int64_t count);

}  // namespace lightkit::cpu::norm_act
