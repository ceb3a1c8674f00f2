#include "decoder.h"

#include "../common/checks.h"
#include "../common/tensors.h"
#include "decoder_weights.h"

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

Decoder::Turn::Turn(Decoder& decoder) : decoder_(decoder), lock_(decoder.mutex_, std::defer_lock) {
  const std::thread::id self = std::this_thread::get_id();
  TORCH_CHECK(decoder.user_ != self, "decoder: a call within another call of the same decoder");
  {
    // Only threads without the GIL wait, so that the one that reads can take the GIL.
    const WithoutGil release;
    lock_.lock();
  }
  decoder.user_ = self;
}

void Decoder::check_room(int64_t steps) const {
  TORCH_CHECK_VALUE(
      !context_.has_value() || steps <= *context_ - position_,
      "the decoder reads ",
      context_.value_or(0),
      " tokens at most, got ",
      steps,
      " after ",
      position_);
}

void Decoder::read_parts(const std::vector<int64_t>& tokens, bool every, float* logits) {
  const int64_t steps = static_cast<int64_t>(tokens.size()) / sequences_;
  const int64_t at_once = std::max<int64_t>(1, kColumns / sequences_);
  for (int64_t begin = 0; begin < steps; begin += at_once) {
    const int64_t count = std::min(at_once, steps - begin);
    {
      const WithoutGil release;
      model_->read(
          tokens.data() + begin * sequences_, count, every, logits + (every ? begin * sequences_ * vocabulary_ : 0));
    }
    position_ += count;
    // A long text takes minutes.
    check_python(PyErr_CheckSignals() != 0);
  }
}

Object Decoder::read(PyObject* object, bool every) {
  const std::vector<int64_t> tokens = checked_tokens(object, sequences_, vocabulary_);
  const int64_t steps = static_cast<int64_t>(tokens.size()) / sequences_;
  const Turn turn(*this);
  check_room(steps);
  const Tensor logits = empty({every ? steps : 1, sequences_, vocabulary_}, at::kFloat);
  read_parts(tokens, every, logits.mutable_data_ptr<float>());
  return wrapped(every ? logits.transpose(0, 1) : logits.squeeze(0));
}

Object Decoder::extend(PyObject* object, int64_t count, const cpu::decode::Sampling& sampling, PyObject* draws) {
  std::vector<int64_t> tokens = checked_tokens(object, sequences_, vocabulary_);
  const int64_t steps = static_cast<int64_t>(tokens.size()) / sequences_;
  TORCH_CHECK_VALUE(count >= 1, "decoder: the number of tokens to add must be at least 1, got ", count);
  TORCH_CHECK_VALUE(
      sampling.temperature >= 0 && sampling.top_k >= 1,
      "decoder: the temperature must be at least 0 and top_k at least 1, got ",
      sampling.temperature,
      " and ",
      sampling.top_k);
  // They live as long as this function reads them.
  DecoderWeights given;
  const float* of_token =
      sampling.temperature == 0 ? nullptr : given.data("the draws", draws, {count, sequences_, vocabulary_});
  int64_t last = 0;
  TORCH_CHECK_VALUE(!c10::add_overflows(steps, count - 1, &last), "decoder: too many tokens to add, got ", count);
  const Turn turn(*this);
  check_room(last);
  const Tensor added = empty({sequences_, count}, at::kLong);
  const Tensor logits = empty({sequences_, vocabulary_}, at::kFloat);
  int64_t* const output = added.mutable_data_ptr<int64_t>();
  float* const of_sequence = logits.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    read_parts(tokens, /*every=*/false, of_sequence);
    tokens.resize(sequences_);
    for (int64_t n = 0; n < sequences_; ++n) {
      const int64_t token = cpu::decode::sample(of_sequence + n * vocabulary_, vocabulary_, sampling, of_token);
      TORCH_CHECK(token >= 0, "decoder: the probabilities of the next token are NaN: the model has diverged");
      tokens[n] = output[n * count + i] = token;
      of_token += of_token == nullptr ? 0 : vocabulary_;
    }
  }
  return wrapped(added);
}

void Decoder::reset() {
  const Turn turn(*this);
  model_->reset();
  position_ = 0;
}

int64_t Decoder::position() {
  const Turn turn(*this);
  return position_;
}

}  // namespace lightkit
