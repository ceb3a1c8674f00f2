#include "transformer.h"

#include "../common/logistic.h"
#include "../common/parallel.h"

#include <cmath>

namespace lightkit::cpu::decode {

Transformer::Scratch::Scratch(int64_t columns, int64_t width, int64_t widest)
    : columns(columns),
      hidden(columns * width),
      normalized(columns * width),
      wide(columns * widest),
      narrow(columns * widest) {}

Transformer::Transformer(const TransformerWeights& weights, int64_t sequences, Precision of_weights, Precision of_cache)
    : width_(weights.width),
      head_size_(weights.head_size),
      sequences_(sequences),
      embedding_(weights.embedding, weights.vocabulary, weights.width, of_weights),
      norm_{{weights.norm, weights.norm + weights.width}, weights.epsilon},
      cosines_(weights.cosines, weights.cosines + weights.context * weights.head_size / 2),
      sines_(weights.sines, weights.sines + weights.context * weights.head_size / 2),
      scratch_(0, 0, 0) {
  if (weights.head != nullptr) {
    head_.emplace_back(weights.head, weights.vocabulary, width_, of_weights);
  }
  layers_.reserve(weights.layers.size());
  for (const TransformerLayer& layer : weights.layers) {
    const int64_t attended = layer.heads * head_size_;
    widest_ = std::max({widest_, 3 * attended, 2 * layer.inner});
    layers_.push_back(
        {.heads = layer.heads,
         .inner = layer.inner,
         .attention_norm = {{layer.attention_norm, layer.attention_norm + width_}, layer.attention_epsilon},
         .qkv = Matrix(layer.qkv, 3 * attended, width_, of_weights),
         .attention_out = Matrix(layer.attention_out, width_, attended, of_weights),
         .feed_forward_norm = {{layer.feed_forward_norm, layer.feed_forward_norm + width_}, layer.feed_forward_epsilon},
         .gate_and_value = Matrix(layer.gate_and_value, 2 * layer.inner, width_, of_weights),
         .feed_forward_out = Matrix(layer.feed_forward_out, width_, layer.inner, of_weights),
         .cache = KeyValueCache(sequences * layer.heads, weights.context, head_size_, of_cache)});
  }
}

// output = input / sqrt(mean(input^2) + epsilon) * weight, for each column.
void Transformer::normalize(const Norm& norm, const float* input, int64_t columns, float* output) const {
  constexpr int64_t size = Vec::size();
  for (int64_t c = 0; c < columns; ++c, input += width_, output += width_) {
    Vec squares(0);
    for (int64_t d = 0; d < width_; d += size) {
      const Vec x = load(input + d, std::min(size, width_ - d), 0.0f);
      squares = at::vec::fmadd(x, x, squares);
    }
    const double mean = static_cast<double>(horizontal_sum(squares)) / static_cast<double>(width_);
    const Vec factor(static_cast<float>(1 / std::sqrt(mean + norm.epsilon)));
    for (int64_t d = 0; d < width_; d += size) {
      const int64_t count = std::min(size, width_ - d);
      const Vec scaled = Vec::loadu(input + d, count) * factor * Vec::loadu(norm.weight.data() + d, count);
      scaled.store(output + d, static_cast<int>(count));
    }
  }
}

// Rotates the pairs (i, size / 2 + i) of a query or key by its position, and multiplies it with a number.
void Transformer::rotate(float* vector, int64_t position, float scale) const {
  const int64_t half = head_size_ / 2;
  const float* const cosines = cosines_.data() + position * half;
  const float* const sines = sines_.data() + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = vector[i], second = vector[half + i];
    vector[i] = (first * cosines[i] - second * sines[i]) * scale;
    vector[half + i] = (first * sines[i] + second * cosines[i]) * scale;
  }
}

// Writes the keys and values of `steps` tokens of each sequence to the cache, and attends to all tokens up to each.
void Transformer::attend(Layer& layer, int64_t steps) {
  const int64_t attended = layer.heads * head_size_, columns = steps * sequences_;
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_size_)));
  float* const wide = scratch_.wide.data();
  // A column is a token of a sequence, and has the tokens of one step side by side.
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t position = position_ + c / sequences_, sequence = c % sequences_;
    float* const query = wide + c * 3 * attended;
    for (int64_t h = 0; h < layer.heads; ++h) {
      float* const key = query + attended + h * head_size_;
      rotate(query + h * head_size_, position, scale);
      rotate(key, position, 1);
      layer.cache.append(sequence * layer.heads + h, position, key, key + attended);
    }
  }
  const int64_t length = position_ + steps;
  const int64_t grain = ceil_div(kMacsPerThread, 2 * length * head_size_);
  parallel_for(0, columns * layer.heads, grain, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> scores(length);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / layer.heads, h = task % layer.heads;
      layer.cache.attend(
          c % sequences_ * layer.heads + h,
          position_ + c / sequences_ + 1,
          wide + c * 3 * attended + h * head_size_,
          scores.data(),
          scratch_.narrow.data() + c * attended + h * head_size_);
    }
  });
}

// narrow = silu(gate) * value
void Transformer::gate(const Layer& layer, int64_t columns) {
  constexpr int64_t size = Vec::size();
  for (int64_t c = 0; c < columns; ++c) {
    const float* const gates = scratch_.wide.data() + c * 2 * layer.inner;
    float* const output = scratch_.narrow.data() + c * layer.inner;
    for (int64_t i = 0; i < layer.inner; i += size) {
      const int64_t count = std::min(size, layer.inner - i);
      const Vec x = Vec::loadu(gates + i, count);
      (x * logistic(x) * Vec::loadu(gates + layer.inner + i, count)).store(output + i, static_cast<int>(count));
    }
  }
}

void Transformer::read(const int64_t* tokens, int64_t steps, bool every, float* logits) {
  const int64_t columns = steps * sequences_;
  if (columns > scratch_.columns) {
    scratch_ = Scratch(columns, width_, widest_);
  }
  float* const hidden = scratch_.hidden.data();
  float* const normalized = scratch_.normalized.data();
  float* const wide = scratch_.wide.data();
  const float* const narrow = scratch_.narrow.data();
  for (int64_t c = 0; c < columns; ++c) {
    embedding_.copy_row(tokens[c], hidden + c * width_);
  }
  for (Layer& layer : layers_) {
    normalize(layer.attention_norm, hidden, columns, normalized);
    layer.qkv.multiply(normalized, columns, wide);
    attend(layer, steps);
    layer.attention_out.multiply(narrow, columns, hidden, /*add=*/true);
    normalize(layer.feed_forward_norm, hidden, columns, normalized);
    layer.gate_and_value.multiply(normalized, columns, wide);
    gate(layer, columns);
    layer.feed_forward_out.multiply(narrow, columns, hidden, /*add=*/true);
  }
  const int64_t wanted = every ? columns : sequences_;
  normalize(norm_, hidden + (columns - wanted) * width_, wanted, normalized);
  (head_.empty() ? embedding_ : head_.front()).multiply(normalized, wanted, logits);
  position_ += steps;
}

}  // namespace lightkit::cpu::decode
