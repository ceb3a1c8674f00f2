#include "decoder.h"

#include "../common/checks.h"
#include "../common/tensors.h"

#include <algorithm>
#include <vector>

namespace lightkit {

using at::Tensor;

namespace {

// The tokens of all sequences that the model reads at once. Derived: with a width of 128 their activations take 0.4 MB,
// which fit the second cache beside a panel of weights; each panel is read once for all of them.
constexpr int64_t kColumns = 64;

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
  std::unique_lock<std::mutex> turn;
  {
    // Only threads without the GIL wait for their turn, so that the one that reads can take the GIL.
    const WithoutGil release;
    turn = std::unique_lock<std::mutex>(mutex_);
  }
  TORCH_CHECK_VALUE(
      !context_.has_value() || steps <= *context_ - position_,
      "the decoder reads ",
      context_.value_or(0),
      " tokens at most, got ",
      steps,
      " after ",
      position_);
  const Tensor logits = empty({every ? steps : 1, sequences_, vocabulary_}, at::kFloat);
  const int64_t at_once = std::max<int64_t>(1, kColumns / sequences_);
  for (int64_t begin = 0; begin < steps; begin += at_once) {
    const int64_t count = std::min(at_once, steps - begin);
    {
      const WithoutGil release;
      float* const output = logits.mutable_data_ptr<float>() + (every ? begin * sequences_ * vocabulary_ : 0);
      model_->read(tokens.data() + begin * sequences_, count, every, output);
    }
    position_ += count;
    // A long text takes minutes: Ctrl-C ends it.
    check_python(PyErr_CheckSignals() != 0);
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
