// The functions that emulated kernels call: barriers, shared memory, collectives of a warp.
#include "scheduler.h"

#include <algorithm>
#include <cstring>

namespace emulation {

static const char kDynamicShared = 0;

void check_launch_bounds(int threads, int) {
  if (block().fibers.size() > static_cast<size_t>(threads)) {
    fail("a block of %zu threads runs a kernel with __launch_bounds__(%d)", block().fibers.size(), threads);
  }
}

void block_barrier(Site site) {
  Block& own = block();
  if (own.done > 0) {
    fail("%u threads of a block ended before __syncthreads of %s", own.done, name(site).c_str());
  }
  if (own.waiting == 0) {
    own.barrier = site;
  } else if (!same(own.barrier, site)) {
    fail("threads of a block wait at different barriers, %s and %s", name(own.barrier).c_str(), name(site).c_str());
  }
  if (++own.waiting < own.fibers.size()) {
    wait(State::AtBlockBarrier, site);
    return;
  }
  own.waiting = 0;
  for (Fiber* fiber : own.fibers) {
    fiber->state = State::Ready;
  }
}

void cluster_arrive(Site site) {
  Fiber& fiber = *machine.current;
  if (fiber.arrived_at_cluster) {
    fail("a thread arrives twice at the cluster barrier, %s", name(site).c_str());
  }
  Cluster& cluster = machine.cluster;
  fiber.arrived_at_cluster = true;
  fiber.cluster_phase = cluster.phase;
  if (++cluster.arrived == cluster.blocks.size() * fiber.block->fibers.size()) {
    cluster.arrived = 0;
    ++cluster.phase;
    for (auto& member : cluster.blocks) {
      for (Fiber* other : member.fibers) {
        if (other->state == State::AtClusterBarrier) {
          other->state = State::Ready;
        }
      }
    }
  }
}

void cluster_wait(Site site) {
  Fiber& fiber = *machine.current;
  if (!fiber.arrived_at_cluster) {
    fail("a thread waits at the cluster barrier without having arrived, %s", name(site).c_str());
  }
  if (machine.cluster.phase == fiber.cluster_phase) {
    wait(State::AtClusterBarrier, site);
  }
  fiber.arrived_at_cluster = false;
}

unsigned cluster_rank() {
  return block().rank;
}

unsigned cluster_size() {
  return static_cast<unsigned>(machine.cluster.blocks.size());
}

int lane() {
  return static_cast<int>(machine.current->linear % kLanes);
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  auto& storage = block().shared[key];
  if (!storage) {
    storage = std::make_unique<Storage>(bytes, alignment);
  }
  return storage->memory;
}

void* dynamic_shared() {
  return static_shared(&kDynamicShared, machine.launch->dynamic_shared, 16);
}

void* peer_shared(void* pointer, unsigned rank, Site site) {
  Cluster& cluster = machine.cluster;
  if (rank >= cluster.blocks.size()) {
    fail("there is no block %u in a cluster of %zu, %s", rank, cluster.blocks.size(), name(site).c_str());
  }
  Block& peer = cluster.blocks[rank];
  if (&peer == &block()) {
    return pointer;
  }
  if (cluster.phase == 0) {
    fail("the shared memory of a block is used before it is known to have started, %s", name(site).c_str());
  }
  if (peer.done == peer.fibers.size()) {
    fail("the shared memory of a block is used after its end, %s", name(site).c_str());
  }
  const auto* address = static_cast<const char*>(pointer);
  for (const auto& [key, own] : block().shared) {
    if (address >= own->memory && address < own->memory + own->bytes) {
      auto& storage = peer.shared[key];
      if (!storage) {
        storage = std::make_unique<Storage>(own->bytes, own->alignment);
      }
      return storage->memory + (address - own->memory);
    }
  }
  fail("map_shared_rank of what is not in shared memory, %s", name(site).c_str());
}

void warp_exchange(
    unsigned mask, const void* mine, size_t bytes, Site site, const std::function<void(const void* (*)(int))>& read) {
  static const Warp::Values* values;
  static Site where;
  Warp& group = warp();
  const unsigned self = 1u << lane();
  if ((mask & self) == 0) {
    fail("a lane takes part in a warp collective whose mask leaves it out, %s", name(site).c_str());
  }
  if (group.arrived == 0) {
    group.mask = mask;
    group.site = site;
  } else if (group.mask != mask || !same(group.site, site)) {
    fail("lanes of a warp meet at different collectives, %s and %s", name(group.site).c_str(), name(site).c_str());
  }
  const uint64_t round = group.round;
  std::memcpy(group.values[round % 2].bytes[lane()], mine, bytes);
  group.arrived |= self;
  const unsigned number = machine.current->linear / kLanes;
  if (group.arrived == (mask & alive(block(), number))) {
    complete_collective(block(), number);
  } else {
    wait(State::AtCollective, site);
  }
  values = &group.values[round % 2];
  where = site;
  read([](int source) -> const void* {
    if ((values->present >> source & 1) == 0) {
      fail("a shuffle reads from lane %d, which takes no part, %s", source, name(where).c_str());
    }
    return values->bytes[source];
  });
}

}  // namespace emulation
