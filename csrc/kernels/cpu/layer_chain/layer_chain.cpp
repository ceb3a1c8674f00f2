#include "layer_chain.h"

#include "../common/pieces.h"
#include "kernels.h"
#include "quantize.h"
#include "tuning.h"

namespace lightkit::cpu::layer_chain {
namespace {

// Calls run(kernel, begin, end) until each kernel has run all its work items, which cost `macs` multiply-adds in all.
// The items of one kernel cost more than those of another, so each share has the same part of every kernel's items.
template <typename F>
void in_shares(const std::vector<int64_t>& work_items, int64_t macs, const F& run) {
  int64_t shares = 0;
  for (const int64_t each : work_items) {
    shares = std::max(shares, each);
  }
  if (shares == 0) {
    return;
  }
  in_pieces(shares, 1, macs, [&](int64_t share, int64_t) {
    for (size_t kernel = 0; kernel < work_items.size(); ++kernel) {
      const int64_t begin = share * work_items[kernel] / shares;
      const int64_t end = (share + 1) * work_items[kernel] / shares;
      if (begin < end) {
        run(kernel, begin, end);
      }
    }
  });
}

// Makes the kernels of the layers from `first` on, and packs their weights.
template <typename Packed, typename T, typename Make>
std::vector<Packed> pack(const std::vector<Layer<T>>& layers, size_t first, const Make& make) {
  std::vector<Packed> packed;
  packed.reserve(layers.size());
  std::vector<int64_t> work_items;
  int64_t macs = 0;
  for (size_t l = first; l < layers.size(); ++l) {
    packed.push_back(make(layers[l]));
    work_items.push_back(packed.back().work_items());
    macs += kPackingMacs * layers[l].shape.out_channels * layers[l].shape.taps();
  }
  in_shares(work_items, macs, [&](size_t l, int64_t begin, int64_t end) { packed[l].prepare(begin, end); });
  return packed;
}

// The offsets at which the layers begin in an array that holds size(layer) elements of each image, layer after layer.
template <typename T, typename Size>
std::vector<int64_t> starts(const std::vector<Layer<T>>& layers, int64_t images, const Size& size) {
  std::vector<int64_t> starts{0};
  for (const auto& layer : layers) {
    starts.push_back(starts.back() + images * size(layer));
  }
  return starts;
}

template <typename T>
int64_t output_size(const Layer<T>& layer) {
  return layer.shape.output_size();
}

// The input of the first layer is not among the activations.
template <typename T>
std::vector<int64_t> activation_starts(const std::vector<Layer<T>>& layers, int64_t images) {
  return starts(
      layers, images, [&](const Layer<T>& layer) { return &layer == layers.data() ? 0 : layer.shape.image_size(); });
}

// Calls run(begin, end) for slices of the images that fit a thread's cache.
template <typename T, typename F>
void in_slices(const std::vector<Layer<T>>& layers, int64_t images, const F& run) {
  int64_t macs = 0;
  int64_t bytes = 0;
  for (const auto& layer : layers) {
    macs += layer.shape.macs();
    bytes += (layer.shape.image_size() + layer.shape.output_size()) * static_cast<int64_t>(sizeof(T));
  }
  const int64_t balanced = images / (kPiecesPerThread * at::get_num_threads());
  const int64_t piece = std::max<int64_t>(1, std::min(kSliceBytes / bytes, balanced));
  in_pieces(images, piece, images * macs, run);
}

// Copies images into zero-padded ones.
template <typename T>
void pad(
    const Layer<T>& layer,
    int64_t images,
    const T* from,  // [images, height - 2 padding, width - 2 padding, in_channels]
    T* to) {        // [images, height, width, in_channels]
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

// Copies images without their padding.
template <typename T>
void crop(
    const Layer<T>& layer,
    int64_t images,
    const T* from,  // [images, height, width, in_channels]
    T* to) {        // [images, height - 2 padding, width - 2 padding, in_channels]
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
void forward(
    const std::vector<Layer<T>>& layers, int64_t images, const T* input, T* output, T* activations, uint8_t* argmax) {
  const auto packed = pack<ForwardKernel<T>>(
      layers, 0, [](const Layer<T>& layer) { return ForwardKernel<T>(layer.shape, layer.weight, layer.bias); });
  const auto activation_start = activation_starts(layers, images);
  const auto argmax_start = starts(layers, images, output_size<T>);
  in_slices(layers, images, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    const T* x = input + begin * layers[0].shape.image_size();
    // Activations that are not kept: the input of a layer, its padded output, and its unpadded output.
    std::array<std::vector<T>, 3> scratch;
    const auto place = [&](size_t which, int64_t size) {
      scratch[which].resize(std::max<size_t>(scratch[which].size(), size));
      return scratch[which].data();
    };
    for (size_t l = 0; l < layers.size(); ++l) {
      const auto& shape = layers[l].shape;
      uint8_t* const kept_argmax = argmax == nullptr ? nullptr : argmax + argmax_start[l] + begin * shape.output_size();
      if (l + 1 == layers.size()) {
        T* const last = output + begin * shape.output_size();
        packed[l].run(count, x, last, kept_argmax);
        quantize(layers[l].output_scale, count * shape.output_size(), last, kept_argmax);
        break;
      }
      const auto& next = layers[l + 1];
      T* const y = activations == nullptr ? place(l % 2, count * next.shape.image_size())
                                          : activations + activation_start[l + 1] + begin * next.shape.image_size();
      T* const unpadded = next.is_padded() ? place(2, count * shape.output_size()) : y;
      packed[l].run(count, x, unpadded, kept_argmax);
      quantize(layers[l].output_scale, count * shape.output_size(), unpadded, kept_argmax);
      if (next.is_padded()) {
        pad(next, count, unpadded, y);
      }
      x = y;
    }
  });
}

template <typename T>
void backward(
    const std::vector<Layer<T>>& layers,
    int64_t images,
    const T* grad_output,
    const T* input,
    const T* activations,
    const uint8_t* argmax,
    T* grad_input,
    const std::vector<LayerGradients<T>>& gradients) {
  // The first layer whose output needs a gradient.
  size_t first = 0;
  if (grad_input == nullptr) {
    while (gradients[first].weight == nullptr) {
      ++first;
    }
  }
  const size_t last = layers.size() - 1;
  const auto argmax_start = starts(layers, images, output_size<T>);
  const auto activation_start = activation_starts(layers, images);
  // The gradients of the outputs of all layers but the last.
  AlignedBuffer<T> grads(argmax_start[last]);
  const auto grad_of = [&](size_t l) { return l == last ? grad_output : grads.data() + argmax_start[l]; };

  const size_t lowest = grad_input == nullptr ? first + 1 : 0;
  const auto packed = pack<GradInputKernel<T>>(
      layers, lowest, [](const Layer<T>& layer) { return GradInputKernel<T>(layer.shape, layer.weight); });
  if (!packed.empty()) {
    in_slices(layers, images, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      std::vector<T> padded;
      for (size_t l = last + 1; l-- > lowest;) {
        const auto& layer = layers[l];
        const int64_t outputs = begin * layer.shape.output_size();
        T* const base = l == 0 ? grad_input : grads.data() + argmax_start[l - 1];
        T* const to = base + begin * layer.unpadded_size();
        if (layer.is_padded()) {
          padded.resize(std::max<size_t>(padded.size(), count * layer.shape.image_size()));
        }
        T* const whole = layer.is_padded() ? padded.data() : to;
        packed[l - lowest].run(count, grad_of(l) + outputs, argmax + argmax_start[l] + outputs, whole);
        if (layer.is_padded()) {
          crop(layer, count, whole, to);
        }
      }
    });
  }

  std::vector<std::unique_ptr<GradWeightKernel<T>>> weights;
  std::vector<int64_t> work_items;
  std::vector<int64_t> finish_items;
  int64_t macs = 0;
  int64_t finish_macs = 0;
  for (size_t l = first; l <= last; ++l) {
    if (gradients[l].weight != nullptr) {
      weights.push_back(
          make_grad_weight<T>({
              .shape = layers[l].shape,
              .images = images,
              .grad_output = grad_of(l),
              .argmax = argmax + argmax_start[l],
              .input = l == 0 ? input : activations + activation_start[l],
              .grad_weight = gradients[l].weight,
              .grad_bias = gradients[l].bias,
          }));
      work_items.push_back(weights.back()->work_items());
      finish_items.push_back(weights.back()->finish_items());
      macs += images * layers[l].shape.macs();
      if (finish_items.back() > 0) {
        finish_macs += kPackingMacs * layers[l].shape.out_channels * layers[l].shape.taps();
      }
    }
  }
  in_shares(work_items, macs, [&](size_t w, int64_t begin, int64_t end) { weights[w]->run(begin, end); });
  in_shares(finish_items, finish_macs, [&](size_t w, int64_t begin, int64_t end) { weights[w]->finish(begin, end); });
}

template void forward(const std::vector<Layer<float>>&, int64_t, const float*, float*, float*, uint8_t*);
template void forward(const std::vector<Layer<double>>&, int64_t, const double*, double*, double*, uint8_t*);
template void backward(
    const std::vector<Layer<float>>&,
    int64_t,
    const float*,
    const float*,
    const float*,
    const uint8_t*,
    float*,
    const std::vector<LayerGradients<float>>&);
template void backward(
    const std::vector<Layer<double>>&,
    int64_t,
    const double*,
    const double*,
    const double*,
    const uint8_t*,
    double*,
    const std::vector<LayerGradients<double>>&);

}  // namespace lightkit::cpu::layer_chain
