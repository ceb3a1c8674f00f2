// The decoder of a recurrent network.

#include "../../kernels/cpu/decode/recurrent.h"
#include "decoder.h"
#include "decoder_weights.h"

namespace lightkit {

using cpu::decode::Cell;
using cpu::decode::RecurrentLayer;
using cpu::decode::RecurrentWeights;

namespace {

constexpr int64_t kTensorsOfCell = 4;

Cell cell_of(const std::string& name) {
  TORCH_CHECK_VALUE(
      name == "lstm" || name == "gru" || name == "elman",
      "decoder: the cell must be 'lstm', 'gru' or 'elman', got '",
      name,
      "'");
  return name == "lstm" ? Cell::Lstm : name == "gru" ? Cell::Gru : Cell::Elman;
}

}  // namespace

std::unique_ptr<Decoder> make_recurrent_decoder(
    const std::string& cell,
    PyObject* embedding,
    PyObject* head,
    PyObject* layers,
    int64_t sequences,
    int64_t weight_bits) {
  const auto of_weights = precision_of("weights", weight_bits);
  checked_sequences(sequences);
  DecoderWeights given;
  RecurrentWeights weights{};
  weights.cell = cell_of(cell);
  const auto sizes = given.sizes("the embedding", embedding, 2);
  weights.vocabulary = sizes[0];
  weights.embedding_size = sizes[1];
  weights.embedding = given.data("the embedding", embedding, {weights.vocabulary, weights.embedding_size});
  const int64_t count = list_size("layers", layers, kTensorsOfCell) / kTensorsOfCell;
  const int64_t hidden = given.sizes("the weight of the state of layer 0", list_item(layers, 1).get(), 2)[1];
  weights.hidden_size = hidden;
  TORCH_CHECK_VALUE(
      head != Py_None || weights.embedding_size == hidden,
      "decoder: an embedding of size ",
      weights.embedding_size,
      " cannot be the head of states of size ",
      hidden);
  weights.head = head == Py_None ? nullptr : given.data("the head", head, {weights.vocabulary, hidden});
  const int64_t rows = cpu::decode::gate_count(weights.cell) * hidden;
  for (int64_t l = 0; l < count; ++l) {
    const auto data = [&](int64_t index, const char* what, at::IntArrayRef wanted) {
      const Object item = list_item(layers, l * kTensorsOfCell + index);
      return given.data(std::string(what) + " of layer " + std::to_string(l), item.get(), wanted);
    };
    weights.layers.push_back(
        {.weight_input = data(0, "the weight of the input", {rows, l == 0 ? weights.embedding_size : hidden}),
         .weight_hidden = data(1, "the weight of the state", {rows, hidden}),
         .bias_input = data(2, "the bias of the input", {rows}),
         .bias_hidden = data(3, "the bias of the state", {rows})});
  }
  auto model = std::make_unique<cpu::decode::Recurrent>(weights, sequences, of_weights);
  return std::make_unique<Decoder>(std::move(model), sequences, weights.vocabulary, std::nullopt);
}

}  // namespace lightkit
