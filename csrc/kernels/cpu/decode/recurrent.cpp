#include "recurrent.h"

#include "../common/logistic.h"

#include <algorithm>

namespace lightkit::cpu::decode {
namespace {

// One vector of a cell's gates: the sums of both products and of both biases, which GRU needs apart.
class Gates {
 public:
  Gates(
      const float* of_input,
      const float* of_hidden,
      const float* bias_input,
      const float* bias_hidden,
      int64_t stride,
      int64_t count)
      : of_input_(of_input),
        of_hidden_(of_hidden),
        bias_input_(bias_input),
        bias_hidden_(bias_hidden),
        stride_(stride),
        count_(count) {}

  Vec input(int gate) const {
    return load(of_input_, gate) + load(bias_input_, gate);
  }
  Vec hidden(int gate) const {
    return load(of_hidden_, gate) + load(bias_hidden_, gate);
  }
  Vec sum(int gate) const {
    return input(gate) + hidden(gate);
  }

 private:
  Vec load(const float* values, int gate) const {
    return Vec::loadu(values + gate * stride_, count_);
  }

  const float* const of_input_;
  const float* const of_hidden_;
  const float* const bias_input_;
  const float* const bias_hidden_;
  const int64_t stride_;
  const int64_t count_;
};

}  // namespace

Recurrent::Scratch::Scratch(int64_t columns, int64_t sequences, int64_t input, int64_t hidden, int64_t gates)
    : columns(columns),
      input(columns * std::max(input, hidden)),
      of_input(columns * gates * hidden),
      of_hidden(sequences * gates * hidden) {}

Recurrent::Recurrent(const RecurrentWeights& weights, int64_t sequences, Precision of_weights)
    : cell_(weights.cell),
      hidden_size_(weights.hidden_size),
      embedding_size_(weights.embedding_size),
      sequences_(sequences),
      embedding_(weights.embedding, weights.vocabulary, weights.embedding_size, of_weights),
      scratch_(0, 0, 0, 0, 0) {
  if (weights.head != nullptr) {
    head_.emplace_back(weights.head, weights.vocabulary, hidden_size_, of_weights);
  }
  const int64_t rows = gate_count(cell_) * hidden_size_;
  int64_t inputs = embedding_size_;
  layers_.reserve(weights.layers.size());
  for (const RecurrentLayer& layer : weights.layers) {
    layers_.push_back(
        {.weight_input = Matrix(layer.weight_input, rows, inputs, of_weights),
         .weight_hidden = Matrix(layer.weight_hidden, rows, hidden_size_, of_weights),
         .bias_input = {layer.bias_input, layer.bias_input + rows},
         .bias_hidden = {layer.bias_hidden, layer.bias_hidden + rows},
         .hidden = std::vector<float>(sequences * hidden_size_),
         .cell = std::vector<float>(cell_ == Cell::Lstm ? sequences * hidden_size_ : 0)});
    inputs = hidden_size_;
  }
}

void Recurrent::reset() {
  for (Layer& layer : layers_) {
    std::fill(layer.hidden.begin(), layer.hidden.end(), 0.0f);
    std::fill(layer.cell.begin(), layer.cell.end(), 0.0f);
  }
}

// Steps the state of a layer, and copies it to `output` [sequences, H]. of_input [sequences, gates, H] has the products
// of the layer's input.
void Recurrent::step(Layer& layer, const float* of_input, float* output) {
  constexpr int64_t size = Vec::size();
  const int64_t rows = gate_count(cell_) * hidden_size_;
  layer.weight_hidden.multiply(layer.hidden.data(), sequences_, scratch_.of_hidden.data());
  for (int64_t n = 0; n < sequences_; ++n) {
    for (int64_t j = 0; j < hidden_size_; j += size) {
      const int64_t count = std::min(size, hidden_size_ - j);
      const Gates gates(
          of_input + n * rows + j,
          scratch_.of_hidden.data() + n * rows + j,
          layer.bias_input.data() + j,
          layer.bias_hidden.data() + j,
          hidden_size_,
          count);
      float* const state = layer.hidden.data() + n * hidden_size_ + j;
      Vec hidden;
      switch (cell_) {
        case Cell::Lstm: {
          float* const cell = layer.cell.data() + n * hidden_size_ + j;
          const Vec kept = logistic(gates.sum(1)) * Vec::loadu(cell, count);
          const Vec next = at::vec::fmadd(logistic(gates.sum(0)), gates.sum(2).tanh(), kept);
          next.store(cell, static_cast<int>(count));
          hidden = logistic(gates.sum(3)) * next.tanh();
          break;
        }
        case Cell::Gru: {
          const Vec candidate = at::vec::fmadd(logistic(gates.sum(0)), gates.hidden(2), gates.input(2)).tanh();
          const Vec share = logistic(gates.sum(1));
          hidden = at::vec::fmadd(share, Vec::loadu(state, count) - candidate, candidate);
          break;
        }
        case Cell::Elman:
          hidden = gates.sum(0).tanh();
          break;
      }
      hidden.store(state, static_cast<int>(count));
    }
  }
  std::copy(layer.hidden.begin(), layer.hidden.end(), output);
}

void Recurrent::read(const int64_t* tokens, int64_t steps, bool every, float* logits) {
  const int64_t columns = steps * sequences_, rows = gate_count(cell_) * hidden_size_;
  if (columns > scratch_.columns) {
    scratch_ = Scratch(columns, sequences_, embedding_size_, hidden_size_, gate_count(cell_));
  }
  float* const input = scratch_.input.data();
  float* const of_input = scratch_.of_input.data();
  for (int64_t c = 0; c < columns; ++c) {
    embedding_.copy_row(tokens[c], input + c * embedding_size_);
  }
  for (Layer& layer : layers_) {
    // The inputs of all steps at once; the states follow one by one, and are the next layer's inputs.
    layer.weight_input.multiply(input, columns, of_input);
    for (int64_t t = 0; t < steps; ++t) {
      step(layer, of_input + t * sequences_ * rows, input + t * sequences_ * hidden_size_);
    }
  }
  const int64_t wanted = every ? columns : sequences_;
  const Matrix& head = head_.empty() ? embedding_ : head_.front();
  head.multiply(input + (columns - wanted) * hidden_size_, wanted, logits);
}

}  // namespace lightkit::cpu::decode
