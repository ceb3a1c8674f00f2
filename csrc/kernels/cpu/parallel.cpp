#include "parallel.h"

#include <omp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <thread>

namespace lightkit::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// How often a thread looks, and how often in a row it must have found the machine calm before threads spin again.
constexpr auto kInterval = std::chrono::milliseconds(100);
constexpr int kCalm = 10;

// Shares of its time that a thread waits for a core. Alone on the machine it waits for less than 0.01, beside one
// spinning process on two cores for 0.3 to 0.5 (benchmarks/results/crowded.csv).
constexpr double kMuch = 0.15;
constexpr double kLittle = 0.03;

// Where two threads on two cores wait for more than kHeavy (beside three processes and more), one alone gets more done.
// It waits for less than two of them, and for kHeavyAlone when two would be as good.
constexpr double kHeavy = 0.55;
constexpr double kHeavyAlone = 0.45;

// Nanoseconds that this thread has run, and waited for a core while it could have.
struct Times {
  int64_t run = 0;
  int64_t waited = 0;
};

// Returns false where the kernel does not tell.
bool read_times(Times& times) {
  std::FILE* file = std::fopen("/proc/thread-self/schedstat", "re");
  if (file == nullptr) {
    return false;
  }
  long long run = 0;
  long long waited = 0;
  const bool complete = std::fscanf(file, "%lld %lld", &run, &waited) == 2;
  std::fclose(file);
  times = {run, waited};
  return complete;
}

// Makes the threads of OpenMP's run-time sleep while they wait for work or for each other.
//
// GNU's spins for about 10 ms, unless it has more threads than there are cores: then it spins for a few microseconds.
// So a thread of our own keeps a team as large as that, which does nothing. (Manual of libgomp, GOMP_SPINCOUNT.)
class Sleepers {
 public:
  void set(bool wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (wanted == wanted_) {
      return;
    }
    wanted_ = wanted;
    if (wanted) {
      std::thread([this] { keep_team(); }).detach();
    } else {
      changed_.notify_all();
    }
  }

 private:
  void keep_team() {
    // Something must be done, or the compiler leaves the team out.
    std::atomic<int> members{0};
#pragma omp parallel num_threads(omp_get_num_procs() + 1)
    ++members;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !wanted_; });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool wanted_ = false;
};

// What is known of the machine; shared by all threads that run kernels.
class Machine {
 public:
  static Machine& instance() {
    // Never destroyed: the thread of the sleepers may outlive static objects.
    static Machine* const machine = new Machine;
    return *machine;
  }

  bool is_heavy() const {
    return is_heavy_.load(std::memory_order_relaxed);
  }

  // Takes note of the share of its time that a thread has waited since it looked last.
  void note(double waited) {
    is_heavy_ = waited > (is_heavy_ ? kHeavyAlone : kHeavy);
    calm_ = waited < kLittle ? calm_ + 1 : 0;
    if (waited > kMuch) {
      sleepers_.set(true);
    } else if (calm_ >= kCalm) {
      sleepers_.set(false);
    }
  }

 private:
  std::atomic<bool> is_heavy_{false};
  std::atomic<int> calm_{0};
  Sleepers sleepers_;
};

}  // namespace

bool is_crowded() {
  if (at::get_num_threads() == 1 || at::in_parallel_region()) {
    return false;
  }
  thread_local Clock::time_point looked;
  thread_local Times before;
  Machine& machine = Machine::instance();
  const auto now = Clock::now();
  if (now - looked >= kInterval) {
    Times times;
    if (!read_times(times)) {
      return false;
    }
    const double run = static_cast<double>(times.run - before.run);
    const double waited = static_cast<double>(times.waited - before.waited);
    // The first time there is nothing to compare with, and who has hardly run since has learnt nothing.
    constexpr double kEnough = std::chrono::nanoseconds(kInterval).count() / 4.0;
    if (looked != Clock::time_point() && run + waited > kEnough) {
      machine.note(waited / (run + waited));
    }
    looked = now;
    before = times;
  }
  return machine.is_heavy();
}

}  // namespace lightkit::cpu
