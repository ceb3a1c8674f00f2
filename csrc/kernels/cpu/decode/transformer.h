// A transformer decoder (lightkit.models.Transformer): RMSNorm before each block, rotary positions, SwiGLU.
#pragma once

#include "attention.h"
#include "matrix.h"
#include "model.h"

#include <vector>

namespace lightkit::cpu::decode {

// The weights, which the model copies. D is the width of the residual stream.
struct TransformerLayer {
  const float* attention_norm;     // [D]
  const float* qkv;                // [3, heads, size, D]
  const float* attention_out;      // [D, heads, size]
  const float* feed_forward_norm;  // [D]
  const float* gate_and_value;     // [2, inner, D]
  const float* feed_forward_out;   // [D, inner]
  int64_t heads;
  int64_t inner;
  double attention_epsilon;
  double feed_forward_epsilon;
};

struct TransformerWeights {
  const float* embedding;  // [vocabulary, D]
  const float* head;       // [vocabulary, D], or null for the embedding
  const float* norm;       // [D]
  const float* cosines;    // [context, size / 2]
  const float* sines;
  std::vector<TransformerLayer> layers;
  int64_t vocabulary;
  int64_t width;      // D
  int64_t head_size;  // size, an even number
  int64_t context;
  double epsilon;
};

class Transformer : public Model {
 public:
  // Raises std::bad_alloc.
  Transformer(const TransformerWeights& weights, int64_t sequences, Precision of_weights, Precision of_cache);

  // The tokens that were read and those of the call are `context` at most.
  void read(const int64_t* tokens, int64_t steps, bool every, float* logits) override;

  void reset() override {
    position_ = 0;
  }

 private:
  struct Norm {
    std::vector<float> weight;
    double epsilon;
  };

  struct Layer {
    int64_t heads;
    int64_t inner;
    Norm attention_norm;
    Matrix qkv;
    Matrix attention_out;
    Norm feed_forward_norm;
    Matrix gate_and_value;
    Matrix feed_forward_out;
    KeyValueCache cache;
  };

  // The activations of `columns` tokens.
  struct Scratch {
    Scratch(int64_t columns, int64_t width, int64_t widest);
    int64_t columns;
    AlignedBuffer<float> hidden;      // [columns, width]
    AlignedBuffer<float> normalized;  // [columns, width]
    AlignedBuffer<float> wide;        // [columns, widest]: queries, keys and values; gates and values
    AlignedBuffer<float> narrow;      // [columns, widest]: what attention and the gates give
  };

  void normalize(const Norm& norm, const float* input, int64_t columns, float* output) const;
  void rotate(float* vector, int64_t position, float scale) const;
  void attend(Layer& layer, int64_t steps);
  void gate(const Layer& layer, int64_t columns);

  const int64_t width_;
  const int64_t head_size_;
  const int64_t sequences_;
  int64_t widest_ = 0;
  Matrix embedding_;
  std::vector<Matrix> head_;  // none if the embedding is the head
  Norm norm_;
  std::vector<float> cosines_;
  std::vector<float> sines_;
  std::vector<Layer> layers_;
  Scratch scratch_;
  int64_t position_ = 0;
};

}  // namespace lightkit::cpu::decode
