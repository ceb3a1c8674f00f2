#include "adam.h"

#include "step.cuh"
#include "step.h"

namespace lightkit::cuda::optim {
namespace {

// The update of kernels/optim/adam.h. A term that is off is left out, not multiplied by 0 or 1, which would make NaN of
// an infinite parameter.
template <typename accumulator>
struct AdamRule {
  using Options = AdamOptions;
  using acc_t = accumulator;
  acc_t factor, shrink, penalty, intake1, beta2, intake2, eps, step, inverse_correction;
  bool shrinks, penalizes;

  static __device__ AdamRule make(const AdamOptions& options, double lr, double factor, double count) {
    return {
        static_cast<acc_t>(factor),
        static_cast<acc_t>(1 - lr * options.weight_decay),
        static_cast<acc_t>(options.weight_decay),
        static_cast<acc_t>(1 - options.beta1),
        static_cast<acc_t>(options.beta2),
        static_cast<acc_t>(1 - options.beta2),
        static_cast<acc_t>(options.eps),
        static_cast<acc_t>(lr / (1 - pow(options.beta1, count))),
        static_cast<acc_t>(1 / sqrt(1 - pow(options.beta2, count))),
        options.decoupled && options.weight_decay != 0,
        !options.decoupled && options.weight_decay != 0,
    };
  }

  __device__ __forceinline__ void update(
      acc_t& value, acc_t gradient, acc_t (&states)[3], const AdamTensor& tensor) const {
    acc_t g = factor * gradient;
    if (penalizes) {
      g += penalty * value;
    } else if (shrinks) {
      value *= shrink;
    }
    states[0] += intake1 * (g - states[0]);
    states[1] = beta2 * states[1] + intake2 * g * g;
    acc_t square = states[1];
    if (tensor.states[2] != nullptr) {
      // As in torch.maximum, NaN of either is the maximum.
      square = states[2] > square || states[2] != states[2] ? states[2] : square;
      states[2] = square;
    }
    value -= step * (states[0] / (sqrt(square) * inverse_correction + eps));
  }
};

}  // namespace

cudaError_t adam(const std::vector<AdamTensor>& tensors, cudaStream_t stream) {
  std::vector<float*> counts;
  for (const auto& tensor : tensors) {
    if (tensor.count_on_device != nullptr) {
      counts.push_back(tensor.count_on_device);
    }
  }
  if (!counts.empty()) {
    if (const auto error = advance_counts(counts, tensors[0].options->skip_on_device, stream); error != cudaSuccess) {
      return error;
    }
  }
  return for_each_batch(tensors, [&](const auto& batch, const auto& kind, int blocks) {
    return with_type(kind.type, [&](auto scalar) {
      using scalar_t = decltype(scalar);
      using acc_t = accumulator_t<scalar_t>;
      return launch_typed<AdamRule<acc_t>, scalar_t, acc_t>(batch, kind.extras, blocks, stream);
    });
  });
}

}  // namespace lightkit::cuda::optim
