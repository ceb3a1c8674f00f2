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

// The interval of the measurements, and the consecutive calm ones after which threads spin again. Chosen.
constexpr auto kInterval = std::chrono::milliseconds(100);
constexpr int kCalmMeasurements = 10;

// Shares of its time that a thread waits for a core: above kSharedWait the machine is shared, below kCalmWait it is
// calm. Measured: alone on the machine a thread waits less than 0.01 of its time, beside one spinning process on two
// cores 0.3 to 0.5. benchmarks/results/crowded.csv has the speeds that these limits give.
constexpr double kSharedWait = 0.15;
constexpr double kCalmWait = 0.03;

// Above kHeavyWaitOfTwo, one thread on two cores gets more done than two; that is beside three and more processes. One
// thread waits less than two do: it waits kHeavyWaitOfOne of its time when two threads would be as fast. Chosen on two
// cores; crowded.csv has the speeds that these limits give beside 1 to 8 processes.
constexpr double kHeavyWaitOfTwo = 0.55;
constexpr double kHeavyWaitOfOne = 0.45;

// Nanoseconds that a thread has run, and that it was runnable without a core.
struct Times {
  int64_t run = 0;
  int64_t waited = 0;
};

// Returns false if the operating system does not tell.
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

// Lets OpenMP's threads sleep while they wait for work or for each other.
//
// GNU's run-time spins for about 10 ms, except that it spins for a few microseconds if it has more threads than there
// are cores (manual of libgomp, GOMP_SPINCOUNT). So a thread keeps an idle team of that size.
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
    // The compiler removes a team that does nothing.
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

// The state of the machine, shared by all threads that run kernels.
class Machine {
 public:
  static Machine& instance() {
    // It is never destroyed: the thread of the sleepers may outlive static objects.
    static Machine* const machine = new Machine;
    return *machine;
  }

  bool is_heavy() const {
    return is_heavy_.load(std::memory_order_relaxed);
  }

  // Notes the share of its time that a thread has waited since its previous measurement.
  void note(double waited) {
    is_heavy_ = waited > (is_heavy_ ? kHeavyWaitOfOne : kHeavyWaitOfTwo);
    calm_ = waited < kCalmWait ? calm_ + 1 : 0;
    if (waited > kSharedWait) {
      sleepers_.set(true);
    } else if (calm_ >= kCalmMeasurements) {
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
  thread_local Clock::time_point previous_time;
  thread_local Times previous;
  Machine& machine = Machine::instance();
  const auto now = Clock::now();
  if (now - previous_time >= kInterval) {
    Times times;
    if (!read_times(times)) {
      return false;
    }
    const double run = static_cast<double>(times.run - previous.run);
    const double waited = static_cast<double>(times.waited - previous.waited);
    // The first measurement has no predecessor, and a thread that has hardly run says nothing about the machine.
    constexpr double kMinRunnable = std::chrono::nanoseconds(kInterval).count() / 4.0;
    if (previous_time != Clock::time_point() && run + waited > kMinRunnable) {
      machine.note(waited / (run + waited));
    }
    previous_time = now;
    previous = times;
  }
  return machine.is_heavy();
}

}  // namespace lightkit::cpu
