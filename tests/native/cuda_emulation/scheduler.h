// The state of the emulated GPU: fibers, warps, blocks, and the scheduler that runs them.
#pragma once

#include "machine.h"

#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulation {

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
  Site site;  // where it waits
  bool arrived_at_cluster;
  uint64_t cluster_phase;  // of its last arrival
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
  ~Storage() {
    operator delete(memory, std::align_val_t(alignment));
  }
  Storage(const Storage&) = delete;
};

struct Block {
  uint3 index;
  unsigned rank;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned waiting = 0;  // at `barrier`
  Site barrier;
  unsigned done = 0;
  std::map<const void*, std::unique_ptr<Storage>> shared;
};

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
};
extern Machine machine;

inline Block& block() {
  return *machine.current->block;
}
inline Warp& warp() {
  return block().warps[machine.current->linear / kLanes];
}

inline std::string name(Site site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Lets other fibers run until this one's state is Ready again.
void wait(State state, Site site);

// Returns the lanes of a warp that have not ended.
unsigned alive(const Block& owner, unsigned warp);

// Ends the collective of a warp whose lanes have all arrived.
void complete_collective(Block& owner, unsigned number);

}  // namespace emulation
