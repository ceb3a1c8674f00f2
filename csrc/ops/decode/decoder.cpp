#include "decoder.h"

#include "../common/checks.h"
#include "../common/tensors.h"

#include <vector>

namespace lightkit {

using at::Tensor;

namespace {

// Returns a copy of tokens [sequences, steps] as [steps, sequences], each of which is in the vocabulary. Nobody else
// can change the copy.
std::vector<int64_t> checked_tokens(PyObject* object, int64_t sequences, int64_t vocabulary) {
  TORCH_CHECK_TYPE(
      is_exact_tensor(object), "decoder: the tokens must be a torch.Tensor, got an object of ", class_name(object));
  const Tensor& tokens = tensor_of(object);
  TORCH_CHECK_VALUE(
      tokens.is_cpu() && tokens.layout() == at::kStrided && tokens.scalar_type() == at::kLong,
      "decoder: the tokens must be int64 on the CPU, got ",
      tokens.scalar_type(),
      " on ",
      tokens.device());
  TORCH_CHECK_VALUE(
      tokens.dim() == 2 && tokens.size(0) == sequences && tokens.size(1) > 0,
      "decoder: the tokens must have the shape (",
      sequences,
      ", T) with T at least 1, got ",
      tokens.sizes());
  check_memory("decoder", "the tokens", tokens);
  const int64_t steps = tokens.size(1), step_stride = tokens.stride(1), sequence_stride = tokens.stride(0);
  const int64_t* const data = tokens.const_data_ptr<int64_t>();
  std::vector<int64_t> copy(steps * sequences);
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t n = 0; n < sequences; ++n) {
      const int64_t token = data[t * step_stride + n * sequence_stride];
      TORCH_CHECK_VALUE(token >= 0 && token < vocabulary, "token ", token, " is not in the vocabulary of ", vocabulary);
      copy[t * sequences + n] = token;
    }
  }
  return copy;
}

}  // namespace

Object Decoder::read(PyObject* object, bool every) {
  const std::vector<int64_t> tokens = checked_tokens(object, sequences_, vocabulary_);
  const int64_t steps = static_cast<int64_t>(tokens.size()) / sequences_;
  Tensor logits;
  {
    const WithoutGil release;
    const std::lock_guard<std::mutex> turn(mutex_);
    TORCH_CHECK_VALUE(
        !context_.has_value() || steps <= *context_ - position_,
        "the decoder reads ",
        context_.value_or(0),
        " tokens at most, got ",
        steps,
        " after ",
        position_);
    logits = empty({every ? steps : 1, sequences_, vocabulary_}, at::kFloat);
    model_->read(tokens.data(), steps, every, logits.mutable_data_ptr<float>());
    position_ += steps;
  }
  return wrapped(every ? logits.transpose(0, 1) : logits.squeeze(0));
}

void Decoder::reset() {
  const WithoutGil release;
  const std::lock_guard<std::mutex> turn(mutex_);
  model_->reset();
  position_ = 0;
}

int64_t Decoder::position() {
  const WithoutGil release;
  const std::lock_guard<std::mutex> turn(mutex_);
  return position_;
}

}  // namespace lightkit
