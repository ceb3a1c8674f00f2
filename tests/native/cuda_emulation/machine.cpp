#include "machine.h"

#include "scheduler.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>

namespace emulation {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;
constexpr unsigned kMaxThreads = 1024;

void switch_to_scheduler(bool for_good) {
  Fiber& fiber = *machine.current;
  __sanitizer_start_switch_fiber(
      for_good ? nullptr : &fiber.fake_stack, machine.scheduler_stack, machine.scheduler_stack_bytes);
  swapcontext(&fiber.context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

}  // namespace

void wait(State state, Site site) {
  machine.current->state = state;
  machine.current->site = site;
  switch_to_scheduler(false);
}

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

namespace {

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
  const int largest =
      allowed.large_cluster ? device.largest_cluster : std::min(device.largest_cluster, device.portable_cluster);
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

}  // namespace emulation
