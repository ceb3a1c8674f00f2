// Recurrent layers between an embedding and a head (lightkit.models.RNNLanguageModel).
#pragma once

#include "matrix.h"
#include "model.h"

#include <vector>

namespace lightkit::cpu::decode {

// The cells of torch.nn.LSTM, GRU and RNN with tanh. The order of their gates is torch's.
enum class Cell { Lstm, Gru, Elman };

inline int64_t gate_count(Cell cell) {
  return cell == Cell::Lstm ? 4 : cell == Cell::Gru ? 3 : 1;
}

// The weights, which the model copies. H is the size of a state.
struct RecurrentLayer {
  const float* weight_input;   // [gates, H, inputs]
  const float* weight_hidden;  // [gates, H, H]
  const float* bias_input;     // [gates, H]
  const float* bias_hidden;    // [gates, H]
};

struct RecurrentWeights {
  const float* embedding;              // [vocabulary, E]
  const float* head;                   // [vocabulary, H], or null for the embedding
  std::vector<RecurrentLayer> layers;  // the inputs of the first are E, those of the others H
  Cell cell;
  int64_t vocabulary;
  int64_t embedding_size;  // E
  int64_t hidden_size;     // H
};

class Recurrent : public Model {
 public:
  // Raises std::bad_alloc.
  Recurrent(const RecurrentWeights& weights, int64_t sequences, Precision of_weights);

  void read(const int64_t* tokens, int64_t steps, bool every, float* logits) override;

  void reset() override;

 private:
  struct Layer {
    Matrix weight_input;
    Matrix weight_hidden;
    std::vector<float> bias_input;
    std::vector<float> bias_hidden;
    std::vector<float> hidden;  // [sequences, H]
    std::vector<float> cell;    // [sequences, H] of an LSTM
  };

  // The activations of `columns` tokens.
  struct Scratch {
    Scratch(int64_t columns, int64_t sequences, int64_t input, int64_t hidden, int64_t gates);
    int64_t columns;
    AlignedBuffer<float> input;      // [columns, E or H]
    AlignedBuffer<float> of_input;   // [columns, gates, H]
    AlignedBuffer<float> of_hidden;  // [sequences, gates, H]
  };

  void step(Layer& layer, const float* of_input, float* output);

  const Cell cell_;
  const int64_t hidden_size_;
  const int64_t embedding_size_;
  const int64_t sequences_;
  Matrix embedding_;
  std::vector<Matrix> head_;  // none if the embedding is the head
  std::vector<Layer> layers_;
  Scratch scratch_;
};

}  // namespace lightkit::cpu::decode
