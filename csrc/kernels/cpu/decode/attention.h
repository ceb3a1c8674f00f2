// The keys and values of a layer's tokens, and attention to them.
#pragma once

#include "../common/aligned_buffer.h"
#include "panels.h"

namespace lightkit::cpu::decode {

class KeyValueCache {
 public:
  // `lanes` is the number of sequences times that of heads; each lane has `context` keys and values of `size`. In int8
  // each key and each value has a scale. Raises std::bad_alloc.
  KeyValueCache(int64_t lanes, int64_t context, int64_t size, Precision precision);

  // Writes the key and the value [size] of the token at a position. Positions of a lane are written in order.
  void append(int64_t lane, int64_t position, const float* key, const float* value);

  // Computes output [size] = sum_t softmax(key[t] . query) value[t] over the first `length` tokens. `query` [size] has
  // the factor of the dot products; scores [length] is scratch.
  void attend(int64_t lane, int64_t length, const float* query, float* scores, float* output) const;

 private:
  // The values that one precision stores. A key is a row of a matrix, a value is a column.
  template <typename T>
  struct Store {
    AlignedBuffer<T> keys;    // [lanes] matrices [context, size]
    AlignedBuffer<T> values;  // [lanes] matrices [size, context]
  };

  template <typename T>
  Panels<T> keys(const Store<T>& store, int64_t lane) const;
  template <typename T>
  Panels<T> values(const Store<T>& store, int64_t lane) const;
  template <typename T>
  void append(const Store<T>& store, int64_t lane, int64_t position, const T* key, const T* value);
  template <typename T>
  void attend(
      const Store<T>& store, int64_t lane, int64_t length, const float* query, float* scores, float* output) const;

  const int64_t context_;
  const int64_t size_;
  const Precision precision_;
  // One of the two has the values.
  Store<float> floats_;
  Store<int8_t> integers_;
  AlignedBuffer<float> key_scales_;  // [lanes, context] for int8
  AlignedBuffer<float> value_scales_;
  AlignedBuffer<int8_t> rounded_;  // [2, size] for int8
};

}  // namespace lightkit::cpu::decode
