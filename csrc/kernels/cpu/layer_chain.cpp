#include "layer_chain.h"

#include "parallel.h"

#include <atomic>

namespace lightkit::cpu {
namespace {

// What a thread works on at a time, in bytes of activations: a part of its second-level cache.
constexpr int64_t kSliceBytes = 512 * 1024;

// Pieces of the images that a thread begins with, if there are so many.
constexpr int64_t kPiecesOfAThread = 4;

// How many multiplications are worth a thread, and what it takes to bring a weight to another place in these.
constexpr int64_t kWorthAThread = int64_t(1) << 17;
constexpr int64_t kPackingCost = 4;

// Calls run(begin, end) for pieces of 0 to `count`, which cost `cost` multiplications in all. Each thread begins with
// pieces of its own and takes over others' when it is done: its core may be the one that nothing else slows down.
template <typename F>
void in_pieces(int64_t count, int64_t piece, int64_t cost, const F& run) {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t pieces = (count + piece - 1) / piece;
  const int64_t allowed = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::max<int64_t>(1, std::min({allowed, cost / kWorthAThread, pieces}));
  const auto parts = std::make_unique<Part[]>(threads);
  for (int64_t t = 0; t < threads; ++t) {
    parts[t].next = t * pieces / threads;
    parts[t].end = (t + 1) * pieces / threads;
  }
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own) {
      for (int64_t t = 0; t < threads; ++t) {
        Part& part = parts[(own + t) % threads];
        for (int64_t p = part.next++; p < part.end; p = part.next++) {
          run(p * piece, std::min(count, (p + 1) * piece));
        }
      }
    }
  });
}

// Calls run(worker, begin, end) until each has had all its units, of the cost of `cost` multiplications together. They
// cost more with one worker than with another: each share has a like part of every worker's.
template <typename F>
void in_shares(const std::vector<int64_t>& units, int64_t cost, const F& run) {
  int64_t shares = 0;
  for (const int64_t each : units) {
    shares = std::max(shares, each);
  }
  in_pieces(shares, 1, cost, [&](int64_t share, int64_t) {
    for (size_t worker = 0; worker < units.size(); ++worker) {
      const int64_t begin = share * units[worker] / shares;
      const int64_t end = (share + 1) * units[worker] / shares;
      if (begin < end) {
        run(worker, begin, end);
      }
    }
  });
}

// One of the two packed weights of each layer from `first` on.
template <typename Packed, typename T, typename Make>
std::vector<Packed> pack(const std::vector<ChainLayer<T>>& layers, size_t first, const Make& make) {
  std::vector<Packed> packed;
  packed.reserve(layers.size());
  std::vector<int64_t> units;
  int64_t cost = 0;
  for (size_t l = first; l < layers.size(); ++l) {
    packed.push_back(make(layers[l]));
    units.push_back(packed.back().units());
    cost += kPackingCost * layers[l].shape.out_channels * layers[l].shape.taps();
  }
  in_shares(units, cost, [&](size_t l, int64_t begin, int64_t end) { packed[l].prepare(begin, end); });
  return packed;
}

// Where what belongs to each layer begins in an array that has it layer after layer: `size` of a layer is for an image.
template <typename T, typename Size>
std::vector<int64_t> starts(const std::vector<ChainLayer<T>>& layers, int64_t images, const Size& size) {
  std::vector<int64_t> starts{0};
  for (const auto& layer : layers) {
    starts.push_back(starts.back() + images * size(layer));
  }
  return starts;
}

template <typename T>
int64_t output_size(const ChainLayer<T>& layer) {
  return layer.shape.output_size();
}

// Those of the first layer are no activations.
template <typename T>
std::vector<int64_t> activation_starts(const std::vector<ChainLayer<T>>& layers, int64_t images) {
  return starts(layers, images, [&](const ChainLayer<T>& layer) {
    return &layer == layers.data() ? 0 : layer.shape.image_size();
  });
}

// Calls run(begin, end) for slices of the images.
template <typename T, typename F>
void in_slices(const std::vector<ChainLayer<T>>& layers, int64_t images, const F& run) {
  int64_t products = 0;
  int64_t bytes = 0;
  for (const auto& layer : layers) {
    products += layer.shape.products();
    bytes += (layer.shape.image_size() + layer.shape.output_size()) * static_cast<int64_t>(sizeof(T));
  }
  const int64_t balanced = images / (kPiecesOfAThread * at::get_num_threads());
  const int64_t piece = std::max<int64_t>(1, std::min(kSliceBytes / bytes, balanced));
  in_pieces(images, piece, images * products, run);
}

// Of images: into the middle of larger ones, 0 around it, or back.
template <typename T>
void pad(const ChainLayer<T>& layer, int64_t images, const T* from, T* to) {
  const auto& shape = layer.shape;
  const int64_t row = (shape.width - 2 * layer.padding[1]) * shape.in_channels;
  const int64_t side = layer.padding[1] * shape.in_channels;
  for (int64_t image = 0; image < images; ++image) {
    to = std::fill_n(to, layer.padding[0] * shape.row_size(), T(0));
    for (int64_t r = 2 * layer.padding[0]; r < shape.height; ++r, from += row) {
      to = std::fill_n(to, side, T(0));
      to = std::copy_n(from, row, to);
      to = std::fill_n(to, side, T(0));
    }
    to = std::fill_n(to, layer.padding[0] * shape.row_size(), T(0));
  }
}

template <typename T>
void crop(const ChainLayer<T>& layer, int64_t images, const T* from, T* to) {
  const auto& shape = layer.shape;
  const int64_t row = (shape.width - 2 * layer.padding[1]) * shape.in_channels;
  for (int64_t image = 0; image < images; ++image, from += shape.image_size()) {
    for (int64_t r = layer.padding[0]; r < shape.height - layer.padding[0]; ++r) {
      to = std::copy_n(from + r * shape.row_size() + layer.padding[1] * shape.in_channels, row, to);
    }
  }
}

}  // namespace

template <typename T>
void layer_chain_forward(
    const std::vector<ChainLayer<T>>& layers,
    int64_t images,
    const T* input,
    T* output,
    T* activations,
    uint8_t* index) {
  const auto packed = pack<ConvReluPoolForward<T>>(layers, 0, [](const ChainLayer<T>& layer) {
    return ConvReluPoolForward<T>(layer.shape, layer.weight, layer.bias);
  });
  const auto activation_start = activation_starts(layers, images);
  const auto index_start = starts(layers, images, output_size<T>);
  in_slices(layers, images, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    const T* x = input + begin * layers[0].shape.image_size();
    // What nobody keeps: what went into the layer, what comes out of it, and what that is before it is padded.
    std::array<std::vector<T>, 3> scratch;
    const auto place = [&](size_t which, int64_t size) {
      scratch[which].resize(std::max<size_t>(scratch[which].size(), size));
      return scratch[which].data();
    };
    for (size_t l = 0; l < layers.size(); ++l) {
      const auto& shape = layers[l].shape;
      uint8_t* const winners = index == nullptr ? nullptr : index + index_start[l] + begin * shape.output_size();
      if (l + 1 == layers.size()) {
        packed[l].run(count, x, output + begin * shape.output_size(), winners);
        break;
      }
      const auto& next = layers[l + 1];
      T* const y = activations == nullptr ? place(l % 2, count * next.shape.image_size())
                                          : activations + activation_start[l + 1] + begin * next.shape.image_size();
      T* const unpadded = next.is_padded() ? place(2, count * shape.output_size()) : y;
      packed[l].run(count, x, unpadded, winners);
      if (next.is_padded()) {
        pad(next, count, unpadded, y);
      }
      x = y;
    }
  });
}

template <typename T>
void layer_chain_backward(
    const std::vector<ChainLayer<T>>& layers,
    int64_t images,
    const T* grad_output,
    const T* input,
    const T* activations,
    const uint8_t* index,
    T* grad_input,
    const std::vector<ChainGradients<T>>& gradients) {
  // The first layer whose output's gradient somebody wants, and the gradients of the outputs of all but the last.
  size_t first = 0;
  if (grad_input == nullptr) {
    while (gradients[first].weight == nullptr) {
      ++first;
    }
  }
  const size_t last = layers.size() - 1;
  const auto index_start = starts(layers, images, output_size<T>);
  const auto activation_start = activation_starts(layers, images);
  AlignedBuffer<T> grads(index_start[last]);
  const auto grad_of = [&](size_t l) { return l == last ? grad_output : grads.data() + index_start[l]; };

  const size_t lowest = grad_input == nullptr ? first + 1 : 0;
  const auto packed = pack<ConvReluPoolGradInput<T>>(layers, lowest, [](const ChainLayer<T>& layer) {
    return ConvReluPoolGradInput<T>(layer.shape, layer.weight);
  });
  if (!packed.empty()) {
    in_slices(layers, images, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      std::vector<T> padded;
      for (size_t l = last + 1; l-- > lowest;) {
        const auto& layer = layers[l];
        const int64_t outputs = begin * layer.shape.output_size();
        T* const base = l == 0 ? grad_input : grads.data() + index_start[l - 1];
        T* const to = base + begin * layer.unpadded_size();
        if (layer.is_padded()) {
          padded.resize(std::max<size_t>(padded.size(), count * layer.shape.image_size()));
        }
        T* const whole = layer.is_padded() ? padded.data() : to;
        packed[l - lowest].run(count, grad_of(l) + outputs, index + index_start[l] + outputs, whole);
        if (layer.is_padded()) {
          crop(layer, count, whole, to);
        }
      }
    });
  }

  std::vector<std::unique_ptr<ConvReluPoolGradWeight<T>>> weights;
  std::vector<int64_t> units;
  int64_t cost = 0;
  for (size_t l = first; l <= last; ++l) {
    if (gradients[l].weight != nullptr) {
      weights.push_back(make_grad_weight<T>({
          .shape = layers[l].shape,
          .images = images,
          .grad_output = grad_of(l),
          .index = index + index_start[l],
          .input = l == 0 ? input : activations + activation_start[l],
          .grad_weight = gradients[l].weight,
          .grad_bias = gradients[l].bias,
      }));
      units.push_back(weights.back()->units());
      cost += images * layers[l].shape.products();
    }
  }
  in_shares(units, cost, [&](size_t w, int64_t begin, int64_t end) { weights[w]->run(begin, end); });
  for (const auto& weight : weights) {
    weight->finish();
  }
}

template void layer_chain_forward(
    const std::vector<ChainLayer<float>>&, int64_t, const float*, float*, float*, uint8_t*);
template void layer_chain_forward(
    const std::vector<ChainLayer<double>>&, int64_t, const double*, double*, double*, uint8_t*);
template void layer_chain_backward(
    const std::vector<ChainLayer<float>>&,
    int64_t,
    const float*,
    const float*,
    const float*,
    const uint8_t*,
    float*,
    const std::vector<ChainGradients<float>>&);
template void layer_chain_backward(
    const std::vector<ChainLayer<double>>&,
    int64_t,
    const double*,
    const double*,
    const double*,
    const uint8_t*,
    double*,
    const std::vector<ChainGradients<double>>&);

}  // namespace lightkit::cpu
