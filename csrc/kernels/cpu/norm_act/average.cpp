// The forward pass that ends with the mean of each image.

#include "../common/aligned_buffer.h"
#include "groups.h"
#include "passes.h"

#include <algorithm>

namespace lightkit::cpu::norm_act {
namespace {

// Sums of the values of each channel: of rows in chains, of chains in blocks, of blocks in double precision.
template <typename T>
class ImageSums {
 public:
  explicit ImageSums(int64_t channels) : channels_(channels), block_(channels), total_(channels) {}

  void start() {
    std::fill_n(total_.data(), channels_, 0.0);
    block_.clear();
    rows_ = 0;
  }

  // Adds at most kChainRows rows.
  void add(const T* values, int64_t rows) {
    if (rows_ + rows > kBlockRows) {
      end_block();
    }
    for_each_group<T>(channels_, [&](auto group) {
      using G = decltype(group);
      Sums<G> chains;
      Sums<G>::for_each_row(0, rows, [&](int64_t row, int turn) {
        LIGHTKIT_UNROLL
        for (int v = 0; v < G::vectors; ++v) {
          chains.add(turn, v, group.load(values + row * channels_, v));
        }
      });
      block_.add(group, chains);
    });
    rows_ += rows;
  }

  void write_means(int64_t rows, T* means) {
    end_block();
    for (int64_t c = 0; c < channels_; ++c) {
      means[c] = static_cast<T>(total_.data()[c] / static_cast<double>(rows));
    }
  }

 private:
  void end_block() {
    for (int64_t c = 0; c < channels_; ++c) {
      total_.data()[c] += block_.first()[c];
    }
    block_.clear();
    rows_ = 0;
  }

  const int64_t channels_;
  BlockSums<T> block_;
  AlignedBuffer<double> total_;
  int64_t rows_ = 0;  // in the block
};

}  // namespace

template <typename T>
void normalize_and_average(const Forward<T>& f) {
  const int64_t channels = f.shape.channels;
  const int64_t image_rows = f.shape.image_rows();
  const int64_t tile = tile_rows<T>(channels);
  const int64_t chunk = chain_rows<T>(channels);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (image_rows * channels));
  parallel_for(0, f.shape.images, grain, [&](int64_t begin, int64_t end) {
    AlignedBuffer<T> values(chunk * channels);
    ImageSums<T> sums(channels);
    for (int64_t image = begin; image < end; ++image) {
      sums.start();
      for (int64_t row = 0; row < image_rows; row += chunk) {
        const int64_t rows = std::min(chunk, image_rows - row);
        const Forward<T> of_chunk = rows_without_pool(f, image * image_rows + row, rows, values.data());
        for (int64_t first = 0; first < rows; first += tile) {
          normalize_tile(of_chunk, first, std::min(rows, first + tile));
        }
        if (f.shape.activation.is_general()) {
          activate(f.shape.activation, values.data(), rows * channels);
        }
        sums.add(values.data(), rows);
      }
      sums.write_means(image_rows, f.output + image * channels);
    }
  });
}

template void normalize_and_average(const Forward<float>&);
template void normalize_and_average(const Forward<double>&);

}  // namespace lightkit::cpu::norm_act
