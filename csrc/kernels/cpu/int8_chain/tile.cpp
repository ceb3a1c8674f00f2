#include "tile.h"

#include <array>
#include <utility>

namespace lightkit::cpu::int8_chain {
namespace {

template <int vectors, bool pool, size_t... index>
constexpr std::array<ComputeTile, kMaxPositions> tiles_of(std::index_sequence<index...>) {
  return {compute_tile<vectors, (index + 1) * (pool ? 4 : 1), pool>...};
}

template <bool pool, size_t... index>
constexpr std::array<std::array<ComputeTile, kMaxPositions>, kMaxVectors> all_tiles(std::index_sequence<index...>) {
  return {tiles_of<index + 1, pool>(std::make_index_sequence<tile_outputs(index + 1, pool)>())...};
}

constexpr auto kTiles = all_tiles<false>(std::make_index_sequence<kMaxVectors>());
constexpr auto kPoolTiles = all_tiles<true>(std::make_index_sequence<kMaxVectors>());

}  // namespace

ComputeTile find_tile(int vectors, int count, bool pool) {
  return (pool ? kPoolTiles : kTiles)[vectors - 1][count - 1];
}

}  // namespace lightkit::cpu::int8_chain
