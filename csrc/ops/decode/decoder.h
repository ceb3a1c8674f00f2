// The decoders of language models as objects of Python: one call reads tokens, and the state stays in the object.
//
// They are objects and no ops: an op has no state, and would check some hundred weights for each token.
#pragma once

#include "../../kernels/cpu/decode/model.h"
#include "../../kernels/cpu/decode/sample.h"
#include "../common/python_tensor.h"

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace lightkit {

// Reads tokens with a model on the CPU. Several threads may read with one decoder: they take turns.
class Decoder {
 public:
  // `context` is the number of tokens of a sequence that the model can read, if it has a limit.
  Decoder(
      std::unique_ptr<cpu::decode::Model> model, int64_t sequences, int64_t vocabulary, std::optional<int64_t> context)
      : model_(std::move(model)), sequences_(sequences), vocabulary_(vocabulary), context_(context) {}

  // Reads tokens, a tensor int64 [sequences, steps] on the CPU. Returns the logits of the token after the last one,
  // float32 [sequences, vocabulary], or after each of them, [sequences, steps, vocabulary]. Raises a ValueError for
  // tokens that do not fit, which changes nothing.
  Object read(PyObject* tokens, bool every);

  // Reads tokens as `read` does, chooses the next token of each sequence, and so on, `count` times; every token that
  // was chosen is read, except the last one. draws: float32 [count, sequences, vocabulary] with draws of the
  // exponential distribution, or None at a temperature of 0. Returns the tokens, int64 [sequences, count]. Raises a
  // ValueError for arguments that do not fit, which changes nothing, and a RuntimeError for probabilities that are NaN.
  Object extend(PyObject* tokens, int64_t count, const cpu::decode::Sampling& sampling, PyObject* draws);

  void reset();

  // Returns the number of tokens of a sequence that were read.
  int64_t position();

 private:
  // Waits, without the GIL, until no other thread uses the decoder, and keeps it for this thread while it lives. Raises
  // a RuntimeError if this thread uses it already: between two tokens the thread runs handlers of signals.
  class Turn {
   public:
    explicit Turn(Decoder& decoder);
    ~Turn() {
      decoder_.user_ = std::thread::id();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Decoder& decoder_;
    std::unique_lock<std::mutex> lock_;
  };

  // Raises a ValueError unless there is room for so many tokens.
  void check_room(int64_t steps) const;

  // Reads tokens [steps, sequences] in parts, between which Ctrl-C raises.
  void read_parts(const std::vector<int64_t>& tokens, bool every, float* logits);

  const std::unique_ptr<cpu::decode::Model> model_;
  const int64_t sequences_;
  const int64_t vocabulary_;
  const std::optional<int64_t> context_;
  std::mutex mutex_;
  std::atomic<std::thread::id> user_{};
  int64_t position_ = 0;
};

// Returns a decoder of lightkit.models.Transformer, which copies the weights. All tensors are contiguous float32 on the
// CPU, and `bits` are 32 or 8. Raises a ValueError or a TypeError for arguments that do not fit.
//
// With V tokens, the width D, L layers, h heads of a size S and the inner width F of a layer, `layers` is a list of 6 L
// tensors: for each layer its norm [D], queries, keys and values [3 h S, D], output [D, h S], norm [D], gate and value
// [2 F, D], output [D, F]. epsilons: a list of 2 L + 1 numbers, of the norms in their order.
std::unique_ptr<Decoder> make_transformer_decoder(
    PyObject* embedding,  // [V, D]
    PyObject* head,       // [V, D], or None for the embedding
    PyObject* layers,
    PyObject* norm,  // [D]
    PyObject* epsilons,
    PyObject* rotation,  // [2, context, S / 2]
    int64_t sequences,
    int64_t weight_bits,
    int64_t cache_bits);

// Returns a decoder of lightkit.models.RNNLanguageModel, as above. `cell` is "lstm", "gru" or "elman", with g = 4, 3 or
// 1 gates. With the size H of a state, `layers` is a list of 4 L tensors: for each layer the weights of its input,
// [g H, E] of the first and [g H, H] of the others, and of its state [g H, H], and the bias of each [g H].
std::unique_ptr<Decoder> make_recurrent_decoder(
    const std::string& cell,
    PyObject* embedding,  // [V, E]
    PyObject* head,       // [V, H], or None for the embedding
    PyObject* layers,
    int64_t sequences,
    int64_t weight_bits);

}  // namespace lightkit
