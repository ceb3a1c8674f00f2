// A language model that reads tokens and keeps its state.
#pragma once

#include <cstdint>

namespace lightkit::cpu::decode {

class Model {
 public:
  virtual ~Model() = default;

  // Reads the next `steps` tokens of every sequence, and computes the logits of the token after the last one, or after
  // each of them.
  //
  // tokens [steps, sequences], within the vocabulary; logits [steps or 1, sequences, vocabulary]. The state changes in
  // place. Raises std::bad_alloc, which leaves the state as it was.
  virtual void read(const int64_t* tokens, int64_t steps, bool every, float* logits) = 0;

  // Forgets all tokens.
  virtual void reset() = 0;
};

}  // namespace lightkit::cpu::decode
