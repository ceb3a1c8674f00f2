// The decoders without Python and torch's dispatcher, for builds of other instructions than those of the machine.

#include "kernels/cpu/decode/recurrent.h"
#include "kernels/cpu/decode/transformer.h"

using namespace lightkit::cpu::decode;

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

// Reads the first half of the tokens at once and the others one by one. tokens [steps, sequences]; logits [steps,
// sequences, vocabulary].
void read(Model& model, const int64_t* tokens, int64_t steps, int64_t sequences, int64_t vocabulary, float* logits) {
  for (int64_t t = 0; t < steps;) {
    const int64_t count = t == 0 ? (steps + 1) / 2 : 1;
    model.read(tokens + t * sequences, count, /*every=*/true, logits + t * sequences * vocabulary);
    t += count;
  }
}

Precision precision(bool int8) {
  return int8 ? Precision::Int8 : Precision::Float;
}

}  // namespace

// tensors: the embedding, the norm, the cosines, the sines, and six of each layer in the order of TransformerLayer.
EXPORTED void transformer(
    const float* const* tensors,
    const int64_t* sizes,  // layers, vocabulary, width, size of a head, context, heads, inner
    double epsilon,
    bool int8,
    const int64_t* tokens,
    int64_t steps,
    int64_t sequences,
    float* logits) {
  TransformerWeights weights{
      .embedding = tensors[0],
      .head = nullptr,
      .norm = tensors[1],
      .cosines = tensors[2],
      .sines = tensors[3],
      .layers = {},
      .vocabulary = sizes[1],
      .width = sizes[2],
      .head_size = sizes[3],
      .context = sizes[4],
      .epsilon = epsilon};
  for (int64_t l = 0; l < sizes[0]; ++l) {
    const float* const* layer = tensors + 4 + 6 * l;
    weights.layers.push_back(
        {layer[0], layer[1], layer[2], layer[3], layer[4], layer[5], sizes[5], sizes[6], epsilon, epsilon});
  }
  Transformer model(weights, sequences, precision(int8), precision(int8));
  read(model, tokens, steps, sequences, sizes[1], logits);
}

// tensors: the embedding, the head, and four of each layer in the order of RecurrentLayer.
EXPORTED void recurrent(
    const float* const* tensors,
    const int64_t* sizes,  // layers, vocabulary, size of an embedding, size of a state
    int cell,
    bool int8,
    const int64_t* tokens,
    int64_t steps,
    int64_t sequences,
    float* logits) {
  RecurrentWeights weights{
      .embedding = tensors[0],
      .head = tensors[1],
      .layers = {},
      .cell = static_cast<Cell>(cell),
      .vocabulary = sizes[1],
      .embedding_size = sizes[2],
      .hidden_size = sizes[3]};
  for (int64_t l = 0; l < sizes[0]; ++l) {
    const float* const* layer = tensors + 2 + 4 * l;
    weights.layers.push_back({layer[0], layer[1], layer[2], layer[3]});
  }
  Recurrent model(weights, sequences, precision(int8));
  read(model, tokens, steps, sequences, sizes[1], logits);
}
