#include "attention.h"

#include <limits>

namespace lightkit::cpu::decode {
namespace {

// Replaces scores by exp(score - most), and returns their sum.
float exponentials(float* scores, int64_t length) {
  constexpr int64_t size = Vec::size();
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  Vec most(lowest);
  for (int64_t t = 0; t < length; t += size) {
    most = at::vec::maximum(most, load(scores + t, std::min(size, length - t), lowest));
  }
  const Vec subtrahend(horizontal_max(most));
  Vec sum(0);
  for (int64_t t = 0; t < length; t += size) {
    const int64_t count = std::min(size, length - t);
    const Vec weights = exp_bounded(load(scores + t, count, lowest) - subtrahend);
    weights.store(scores + t, static_cast<int>(count));
    sum = sum + weights;
  }
  return horizontal_sum(sum);
}

}  // namespace

KeyValueCache::KeyValueCache(int64_t lanes, int64_t context, int64_t size, Precision precision)
    : context_(context),
      size_(size),
      precision_(precision),
      floats_{
          AlignedBuffer<float>(precision == Precision::Float ? lanes * Panels<float>::size(context, size) : 0),
          AlignedBuffer<float>(precision == Precision::Float ? lanes * Panels<float>::size(size, context) : 0)},
      integers_{
          AlignedBuffer<int8_t>(precision == Precision::Int8 ? lanes * Panels<int8_t>::size(context, size) : 0),
          AlignedBuffer<int8_t>(precision == Precision::Int8 ? lanes * Panels<int8_t>::size(size, context) : 0)},
      key_scales_(precision == Precision::Int8 ? lanes * context : 0),
      value_scales_(precision == Precision::Int8 ? lanes * context : 0),
      rounded_(precision == Precision::Int8 ? 2 * size : 0) {}

template <typename T>
Panels<T> KeyValueCache::keys(const Store<T>& store, int64_t lane) const {
  return {const_cast<T*>(store.keys.data()) + lane * Panels<T>::size(context_, size_), context_, size_};
}

template <typename T>
Panels<T> KeyValueCache::values(const Store<T>& store, int64_t lane) const {
  return {const_cast<T*>(store.values.data()) + lane * Panels<T>::size(size_, context_), size_, context_};
}

template <typename T>
void KeyValueCache::append(const Store<T>& store, int64_t lane, int64_t position, const T* key, const T* value) {
  const Panels<T> keys = this->keys(store, lane), values = this->values(store, lane);
  for (int64_t d = 0; d < size_; ++d) {
    T* const to = keys.at(position, d);
    if (position % kBlock == 0) {
      // The products of a block are computed of all its rows: memory that nothing has written may hold subnormal
      // numbers, which take the processor a hundred cycles each.
      std::fill_n(to, kBlock, T(0));
    }
    *to = key[d];
  }
  for (int64_t d = 0; d < round_up(size_, kBlock); ++d) {
    *values.at(d, position) = d < size_ ? value[d] : T(0);
  }
}

void KeyValueCache::append(int64_t lane, int64_t position, const float* key, const float* value) {
  if (precision_ == Precision::Float) {
    return append(floats_, lane, position, key, value);
  }
  int8_t* const rounded = rounded_.data();
  key_scales_.data()[lane * context_ + position] = quantize(key, size_, rounded);
  value_scales_.data()[lane * context_ + position] = quantize(value, size_, rounded + size_);
  append(integers_, lane, position, rounded, rounded + size_);
}

template <typename T>
void KeyValueCache::attend(
    const Store<T>& store, int64_t lane, int64_t length, const float* query, float* scores, float* output) const {
  constexpr int64_t size = Vec::size();
  constexpr bool scaled = sizeof(T) == 1;
  const Panels<T> keys = this->keys(store, lane), values = this->values(store, lane);
  const int64_t first_scale = lane * context_;
  const Product of_keys{
      .rows = length,
      .columns = size_,
      .scales = scaled ? key_scales_.data() + first_scale : nullptr,
      .input = query,
      .input_stride = size_,
      .output = scores,
      .output_stride = length,
      .count = 1,
      .add = false};
  multiply<T>({keys.values, context_, size_}, of_keys, 0, ceil_div(length, kPanel));
  const float sum = exponentials(scores, length);
  if constexpr (scaled) {
    for (int64_t t = 0; t < length; t += size) {
      const int64_t count = std::min(size, length - t);
      const Vec weights = Vec::loadu(scores + t, count) * Vec::loadu(value_scales_.data() + first_scale + t, count);
      weights.store(scores + t, static_cast<int>(count));
    }
  }
  const Product of_values{
      .rows = size_,
      .columns = length,
      .scales = nullptr,
      .input = scores,
      .input_stride = length,
      .output = output,
      .output_stride = size_,
      .count = 1,
      .add = false};
  multiply<T>({values.values, size_, context_}, of_values, 0, ceil_div(size_, kPanel));
  const Vec divisor(sum);
  for (int64_t d = 0; d < size_; d += size) {
    const int64_t count = std::min(size, size_ - d);
    (Vec::loadu(output + d, count) / divisor).store(output + d, static_cast<int>(count));
  }
}

void KeyValueCache::attend(int64_t lane, int64_t length, const float* query, float* scores, float* output) const {
  if (precision_ == Precision::Float) {
    attend(floats_, lane, length, query, scores, output);
  } else {
    attend(integers_, lane, length, query, scores, output);
  }
}

}  // namespace lightkit::cpu::decode
