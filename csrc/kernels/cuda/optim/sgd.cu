#include "sgd.h"

#include "step.cuh"

namespace lightkit::cuda::optim {
namespace {

// The update of kernels/optim/sgd.h. A term that is off is left out, not multiplied by 0, which would make NaN of an
// infinite parameter or of an uninitialised momentum buffer.
template <typename accumulator>
struct SgdRule {
  using Options = SgdOptions;
  using acc_t = accumulator;
  acc_t factor, lr, weight_decay, momentum, intake;
  bool nesterov;

  static __device__ SgdRule make(const SgdOptions& options, double lr, double factor, double /*count*/) {
    return {
        static_cast<acc_t>(factor),
        static_cast<acc_t>(lr),
        static_cast<acc_t>(options.weight_decay),
        static_cast<acc_t>(options.momentum),
        static_cast<acc_t>(1 - options.dampening),
        options.nesterov,
    };
  }

  __device__ __forceinline__ void update(
      acc_t& value, acc_t gradient, acc_t (&states)[1], const SgdTensor& tensor) const {
    acc_t direction = factor * gradient;
    if (weight_decay != 0) {
      direction += weight_decay * value;
    }
    if (tensor.states[0] != nullptr) {
      states[0] = tensor.first ? direction : momentum * states[0] + intake * direction;
      direction = nesterov ? direction + momentum * states[0] : states[0];
    }
    value -= lr * direction;
  }
};

}  // namespace

cudaError_t sgd(const std::vector<SgdTensor>& tensors, cudaStream_t stream) {
  return for_each_batch(tensors, [&](const auto& batch, const auto& kind, int blocks) {
    return with_type(kind.type, [&](auto scalar) {
      using scalar_t = decltype(scalar);
      using acc_t = accumulator_t<scalar_t>;
      return kind.wide ? launch_typed<SgdRule<acc_t>, scalar_t, acc_t>(batch, kind.extras, blocks, stream)
                       : launch_typed<SgdRule<acc_t>, scalar_t, scalar_t>(batch, kind.extras, blocks, stream);
    });
  });
}

}  // namespace lightkit::cuda::optim
