#include "machine.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr int kLanes = 32;

// Not a number in any floating-point type, and no index of anything.
constexpr int kGarbage = 0xff;

enum class State { Ready, AtBlockBarrier, AtClusterBarrier, AtCollective, Done };

struct Block;

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  uint3 index;
  Block* block;
  unsigned linear;
  State state;
  Site site;                  // where it waits
  bool arrived_at_cluster;
  uint64_t cluster_phase;     // of its last arrival
};

// A collective of a warp. Values are kept twice: a lane may bring the next one before another has read the last.
struct Warp {
  unsigned arrived = 0;
  unsigned mask = 0;
  Site site;
  uint64_t round = 0;
  struct Values {
    unsigned present = 0;
    char bytes[kLanes][8];
  } values[2];
};

// Exactly as large as asked for, so that the address sanitizer sees an access beyond it.
struct Storage {
  char* memory;
  size_t bytes;
  size_t alignment;

  Storage(size_t bytes, size_t alignment) : bytes(bytes), alignment(alignment) {
    memory = static_cast<char*>(operator new(bytes, std::align_val_t(alignment)));
    std::memset(memory, kGarbage, bytes);
  }
  ~Storage() { operator delete(memory, std::align_val_t(alignment)); }
  Storage(const Storage&) = delete;
};

struct Block {
  uint3 index;
  unsigned rank;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned waiting = 0;   // at `barrier`
  Site barrier;
  unsigned done = 0;
  std::map<const void*, std::unique_ptr<Storage>> shared;
};

const char kDynamicShared = 0;

// The blocks that run together: a cluster, or one block.
struct Cluster {
  std::vector<Block> blocks;
  unsigned arrived = 0;
  uint64_t phase = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  const Launch* launch = nullptr;
  Cluster cluster;
  Fiber* current = nullptr;
  bool trapped = false;
  int64_t launches = 0;
  std::map<const void*, Permission> permissions;
  std::mt19937 random{1};
} machine;

Block& block() { return *machine.current->block; }
Warp& warp() { return block().warps[machine.current->linear / kLanes]; }

std::string name(Site site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void switch_to_scheduler(bool for_good) {
  Fiber& fiber = *machine.current;
  __sanitizer_start_switch_fiber(
      for_good ? nullptr : &fiber.fake_stack, machine.scheduler_stack, machine.scheduler_stack_bytes);
  swapcontext(&fiber.context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void wait(State state, Site site) {
  machine.current->state = state;
  machine.current->site = site;
  switch_to_scheduler(false);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  try {
    machine.launch->thread();
  } catch (const Trap&) {
    machine.trapped = true;
  }
  Fiber& fiber = *machine.current;
  if (fiber.arrived_at_cluster) {
    fail("a thread ended after cluster barrier_arrive without barrier_wait");
  }
  fiber.state = State::Done;
  Block& own = *fiber.block;
  if (++own.done == own.fibers.size()) {
    own.shared.clear();
  }
  switch_to_scheduler(true);
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block->index;
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
  swapcontext(&machine.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
}

Fiber* make_fiber(size_t number) {
  while (machine.fibers.size() <= number) {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(
        nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      fail("no memory for the stack of thread %zu", number);
    }
    fiber->stack = static_cast<char*>(memory) + kGuardBytes;
    machine.fibers.push_back(std::move(fiber));
  }
  return machine.fibers[number].get();
}

void start(Fiber& fiber, Block& owner, unsigned linear) {
  fiber.block = &owner;
  fiber.linear = linear;
  fiber.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
  fiber.state = State::Ready;
  fiber.arrived_at_cluster = false;
  fiber.fake_stack = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// The lanes of a warp that have not ended.
unsigned alive(const Block& owner, unsigned warp) {
  unsigned lanes = 0;
  for (unsigned i = warp * kLanes; i < std::min<size_t>(owner.fibers.size(), (warp + 1) * kLanes); ++i) {
    lanes |= owner.fibers[i]->state == State::Done ? 0u : 1u << i % kLanes;
  }
  return lanes;
}

void complete_collective(Block& owner, unsigned number) {
  Warp& group = owner.warps[number];
  group.values[group.round % 2].present = group.arrived;
  for (unsigned i = number * kLanes; i < std::min<size_t>(owner.fibers.size(), (number + 1) * kLanes); ++i) {
    if (group.arrived >> i % kLanes & 1) {
      owner.fibers[i]->state = State::Ready;
    }
  }
  group.arrived = 0;
  ++group.round;
}

// What nobody can resolve by running on: lanes that wait for one that ended, or a deadlock.
void resolve_or_fail(const std::vector<Fiber*>& fibers) {
  bool resolved = false;
  for (auto& owner : machine.cluster.blocks) {
    for (unsigned w = 0; w < owner.warps.size(); ++w) {
      Warp& group = owner.warps[w];
      if (group.arrived != 0 && group.arrived == (group.mask & alive(owner, w))) {
        complete_collective(owner, w);
        resolved = true;
      }
    }
  }
  if (resolved) {
    return;
  }
  std::map<std::string, int> places;
  for (const Fiber* fiber : fibers) {
    switch (fiber->state) {
      case State::Done:
        ++places["ended"];
        break;
      case State::AtBlockBarrier:
        ++places["wait at __syncthreads of " + name(fiber->site)];
        break;
      case State::AtClusterBarrier:
        ++places["wait at the cluster barrier of " + name(fiber->site)];
        break;
      default:
        ++places["wait at the warp collective of " + name(fiber->site)];
    }
  }
  std::string text;
  for (const auto& [place, count] : places) {
    text += "\n  " + std::to_string(count) + " threads " + place;
  }
  fail("deadlock:%s", text.c_str());
}

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == Order::Backward) {
    std::reverse(numbers.begin(), numbers.end());
  } else if (order == Order::Shuffled) {
    std::shuffle(numbers.begin(), numbers.end(), machine.random);
  }
  return numbers;
}

void run_cluster(const Launch& launch, unsigned first_block) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  Cluster& cluster = machine.cluster;
  cluster.arrived = 0;
  cluster.phase = 0;
  cluster.blocks.clear();
  cluster.blocks.resize(launch.cluster);
  std::vector<Fiber*> fibers;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Block& member = cluster.blocks[rank];
    const unsigned linear = first_block + rank;
    member.index = {linear % gridDim.x, linear / gridDim.x % gridDim.y, linear / gridDim.x / gridDim.y};
    member.rank = rank;
    member.warps.resize((threads + kLanes - 1) / kLanes);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber* fiber = make_fiber(fibers.size());
      start(*fiber, member, i);
      member.fibers.push_back(fiber);
      fibers.push_back(fiber);
    }
  }
  unsigned left = static_cast<unsigned>(fibers.size());
  while (left > 0 && !machine.trapped) {
    bool progress = false;
    for (const unsigned number : in_order(static_cast<unsigned>(fibers.size()))) {
      Fiber& fiber = *fibers[number];
      if (fiber.state == State::Ready) {
        progress = true;
        resume(fiber);
        if (machine.trapped) {
          break;
        }
        left -= fiber.state == State::Done;
      }
    }
    if (!progress && left > 0) {
      resolve_or_fail(fibers);
    }
  }
  cluster.blocks.clear();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulated GPU: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  std::fflush(stderr);
  _Exit(3);
}

Permission& permission(const void* kernel) {
  return machine.permissions[kernel];
}

bool run(const Launch& launch) {
  const dim3 &grid = launch.grid, &threads = launch.block;
  const uint64_t per_block = uint64_t{threads.x} * threads.y * threads.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const Permission& allowed = permission(launch.kernel);
  const int largest = allowed.large_cluster ? device.largest_cluster : std::min(device.largest_cluster, device.portable_cluster);
  const bool fits = per_block >= 1 && per_block <= kMaxThreads && threads.z <= 64 && blocks >= 1 &&
      grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && launch.dynamic_shared <= allowed.dynamic_shared &&
      (launch.cluster == 1 || (static_cast<int>(launch.cluster) <= largest && grid.x % launch.cluster == 0));
  if (!fits || machine.trapped) {
    return false;
  }
  ++machine.launches;
  machine.launch = &launch;
  gridDim = grid;
  blockDim = threads;
  for (const unsigned number : in_order(static_cast<unsigned>(blocks / launch.cluster))) {
    run_cluster(launch, number * launch.cluster);
    if (machine.trapped) {
      break;
    }
  }
  machine.launch = nullptr;
  return !machine.trapped;
}

void reset() {
  machine.trapped = false;
  machine.launches = 0;
}

bool trapped() {
  return machine.trapped;
}

int64_t launches() {
  return machine.launches;
}

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
