// The decoder of a transformer.

#include "../../kernels/cpu/decode/transformer.h"
#include "decoder.h"
#include "decoder_weights.h"

namespace lightkit {

using cpu::decode::TransformerLayer;
using cpu::decode::TransformerWeights;

namespace {

constexpr int64_t kTensorsOfLayer = 6;

double epsilon(PyObject* list, int64_t index) {
  const double value = PyFloat_AsDouble(list_item(list, index).get());
  check_python(value == -1.0);
  // A negative epsilon would make NaN of small inputs.
  TORCH_CHECK_VALUE(value >= 0, "decoder: an epsilon must be at least 0, got ", value);
  return value;
}

}  // namespace

std::unique_ptr<Decoder> make_transformer_decoder(
    PyObject* embedding,
    PyObject* head,
    PyObject* layers,
    PyObject* norm,
    PyObject* epsilons,
    PyObject* rotation,
    int64_t sequences,
    int64_t weight_bits,
    int64_t cache_bits) {
  const auto of_weights = precision_of("weights", weight_bits), of_cache = precision_of("cache", cache_bits);
  checked_sequences(sequences);
  DecoderWeights given;
  TransformerWeights weights{};
  const auto sizes = given.sizes("the embedding", embedding, 2);
  weights.vocabulary = sizes[0];
  const int64_t width = weights.width = sizes[1];
  weights.embedding = given.data("the embedding", embedding, {weights.vocabulary, width});
  weights.head = head == Py_None ? nullptr : given.data("the head", head, {weights.vocabulary, width});
  weights.norm = given.data("the norm", norm, {width});
  const auto angles = given.sizes("the rotation", rotation, 3);
  weights.context = angles[1];
  const int64_t half = angles[2], size = weights.head_size = 2 * half;
  weights.cosines = given.data("the rotation", rotation, {2, weights.context, half});
  weights.sines = weights.cosines + weights.context * half;
  const int64_t count = list_size("layers", layers, kTensorsOfLayer) / kTensorsOfLayer;
  TORCH_CHECK_VALUE(
      list_size("epsilons", epsilons, 1) == 2 * count + 1,
      "decoder: there must be ",
      2 * count + 1,
      " epsilons of ",
      count,
      " layers, got ",
      PyList_Size(epsilons));
  weights.epsilon = epsilon(epsilons, 2 * count);
  for (int64_t l = 0; l < count; ++l) {
    const auto item = [&](int64_t index) { return list_item(layers, l * kTensorsOfLayer + index); };
    const auto name = [&](const char* what) { return std::string(what) + " of layer " + std::to_string(l); };
    TransformerLayer layer{};
    const Object attention_out = item(2), feed_forward_out = item(5);
    const int64_t attended = given.sizes(name("the output of attention"), attention_out.get(), 2)[1];
    TORCH_CHECK_VALUE(
        attended % size == 0,
        "decoder: the inputs of ",
        name("the output of attention"),
        " must be a multiple of the size of a head, ",
        size,
        ", got ",
        attended);
    layer.heads = attended / size;
    layer.inner = given.sizes(name("the output of feed-forward"), feed_forward_out.get(), 2)[1];
    layer.attention_norm = given.data(name("the norm of attention"), item(0).get(), {width});
    layer.qkv = given.data(name("the queries, keys and values"), item(1).get(), {3 * attended, width});
    layer.attention_out = given.data(name("the output of attention"), attention_out.get(), {width, attended});
    layer.feed_forward_norm = given.data(name("the norm of feed-forward"), item(3).get(), {width});
    layer.gate_and_value = given.data(name("gate and value"), item(4).get(), {2 * layer.inner, width});
    layer.feed_forward_out =
        given.data(name("the output of feed-forward"), feed_forward_out.get(), {width, layer.inner});
    layer.attention_epsilon = epsilon(epsilons, 2 * l);
    layer.feed_forward_epsilon = epsilon(epsilons, 2 * l + 1);
    // Rounded up to whole blocks, the cache has fewer than 32 times as many elements.
    checked_product("decoder: the cache", {32 * sequences, weights.context, attended, int64_t(sizeof(float))});
    weights.layers.push_back(layer);
  }
  auto model = std::make_unique<cpu::decode::Transformer>(weights, sequences, of_weights, of_cache);
  return std::make_unique<Decoder>(std::move(model), sequences, weights.vocabulary, weights.context);
}

}  // namespace lightkit
