// Runs kernels on request. A request is a line on standard input, for `buffer` with its bytes after it:
//
//   buffer NAME BYTES OFFSET   memory of exactly that size, OFFSET bytes behind a multiple of 16
//   set NAME VALUE             an option of the next call
//   call FUNCTION              answers "done ERROR LAUNCHES": the CUDA error and the number of kernels run
//   fetch NAME                 answers with the bytes of a buffer
//   clear                      forgets buffers, options and errors
//
// What kernels print goes to standard error.
#include "../../../csrc/kernels/cuda/cross_entropy/cross_entropy.h"
#include "../../../csrc/kernels/cuda/linear_cross_entropy/linear_cross_entropy.h"
#include "../../../csrc/kernels/cuda/optim/adam.h"
#include "../../../csrc/kernels/cuda/optim/sgd.h"
#include "../../../csrc/kernels/cuda/optim/step.h"
#include "faults.h"

#include <sanitizer/asan_interface.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace lightkit;

class Buffer {
 public:
  Buffer(size_t bytes, size_t offset) : bytes_(bytes), offset_(offset), memory_(new (kAligned) char[bytes + offset]) {
    __asan_poison_memory_region(memory_, offset);
  }
  ~Buffer() {
    __asan_unpoison_memory_region(memory_, offset_);
    operator delete[](memory_, kAligned);
  }
  Buffer(const Buffer&) = delete;
  char* data() {
    return memory_ + offset_;
  }
  size_t bytes() const {
    return bytes_;
  }

 private:
  static constexpr std::align_val_t kAligned{16};
  size_t bytes_;
  size_t offset_;
  char* memory_;
};

std::map<std::string, Buffer> buffers;
std::map<std::string, std::string> settings;

template <typename T>
T setting(const std::string& name, T otherwise = {}) {
  T value = otherwise;
  if (const auto found = settings.find(name); found != settings.end()) {
    std::istringstream(found->second) >> value;
  }
  return value;
}

template <typename T = void>
T* buffer(const std::string& name) {
  const auto found = buffers.find(name);
  return found == buffers.end() ? nullptr : reinterpret_cast<T*>(found->second.data());
}

cudaError_t call_cross_entropy() {
  cuda::cross_entropy::Rows rows{};
  rows.type = static_cast<ElementType>(setting<int>("type"));
  rows.logits = buffer("logits");
  rows.rows = setting<int64_t>("rows");
  rows.classes = setting<int64_t>("classes");
  rows.target = buffer<int64_t>("target");
  rows.probabilities = buffer("probabilities");
  rows.ignore_index = setting<int64_t>("ignore_index", -100);
  rows.weight = buffer("weight");
  rows.smoothing = setting<double>("smoothing");
  rows.z_loss = setting<double>("z_loss");
  rows.softcap = setting<double>("softcap");
  rows.mean = setting<int>("mean");
  Buffer scratch(sizeof(cuda::cross_entropy::Scratch), 0);
  std::memset(scratch.data(), 0xff, scratch.bytes());
  rows.scratch = reinterpret_cast<cuda::cross_entropy::Scratch*>(scratch.data());
  rows.losses = buffer("losses");
  rows.lse = buffer("lse");
  rows.gradient = buffer(setting<int>("inplace") ? "logits" : "gradient");
  rows.total = buffer("total");
  rows.total_type = static_cast<ElementType>(setting<int>("total_type"));
  return cuda::cross_entropy::run(rows, nullptr);
}

cuda::linear_cross_entropy::Slice linear_slice() {
  cuda::linear_cross_entropy::Slice slice{};
  slice.type = static_cast<ElementType>(setting<int>("type"));
  slice.logits = buffer("logits");
  slice.rows = setting<int64_t>("rows");
  slice.begin = setting<int64_t>("begin");
  slice.classes = setting<int64_t>("classes");
  slice.all_classes = setting<int64_t>("all_classes");
  slice.target = buffer<int64_t>("target");
  slice.ignore_index = setting<int64_t>("ignore_index", -100);
  slice.bias = buffer("bias");
  slice.weight = buffer("weight");
  slice.smooth = setting<int>("smooth") != 0;
  slice.softcap = setting<double>("softcap");
  slice.maximum = buffer("maximum");
  slice.sum = buffer("sum");
  slice.soft = buffer("soft");
  slice.target_logit = buffer("target_logit");
  slice.factor = buffer("factor");
  slice.soft_factor = buffer("soft_factor");
  slice.target_gradient = buffer("target_gradient");
  slice.gradient = buffer(setting<int>("inplace") ? "logits" : "gradient");
  return slice;
}

cudaError_t call_scale_rows() {
  return cuda::cross_entropy::scale_rows(
      buffer("gradient"),
      static_cast<ElementType>(setting<int>("type")),
      setting<int64_t>("rows"),
      setting<int64_t>("classes"),
      buffer("factor"),
      setting<int>("per_row"),
      nullptr);
}

void read_options(StepOptions& options) {
  options.maximize = setting<int>("maximize") != 0;
  options.ema_decay = setting<double>("ema_decay");
  options.lr_on_device = buffer<float>("lr_on_device");
  options.scale_on_device = buffer<float>("scale_on_device");
  options.skip_on_device = buffer<float>("skip_on_device");
  options.norm_on_device = buffer<double>("norm_on_device");
  options.max_norm = setting<double>("max_norm");
}

// The tensors are the buffers parameter0, gradient0, ..., parameter1, ..., their states those of the given names.
template <typename Options>
std::vector<StepTensor<Options>> step_tensors(
    const Options& options, const std::array<const char*, Options::kStates>& states) {
  std::vector<StepTensor<Options>> tensors;
  for (int i = 0; i < setting<int>("tensors"); ++i) {
    const auto number = std::to_string(i);
    StepTensor<Options> tensor{
        .parameter = buffer("parameter" + number),
        .gradient = buffer("gradient" + number),
        .master = buffer<float>("master" + number),
        .average = buffer("average" + number),
        .numel = setting<int64_t>("numel" + number),
        .type = static_cast<ElementType>(setting<int>("type" + number)),
        .count = setting<int64_t>("count" + number),
        .count_on_device = buffer<float>("count_on_device" + number),
        .first = setting<int>("first" + number) != 0,
        .first_average = setting<int>("first_average" + number) != 0,
        .stochastic = setting<int>("stochastic" + number) != 0,
        .key = setting<uint64_t>("key" + number),
        .options = &options,
    };
    for (size_t s = 0; s < states.size(); ++s) {
      tensor.states[s] = buffer(states[s] + number);
    }
    tensors.push_back(tensor);
  }
  return tensors;
}

cudaError_t call_sgd() {
  SgdOptions options{};
  read_options(options);
  options.lr = setting<double>("lr");
  options.momentum = setting<double>("momentum");
  options.dampening = setting<double>("dampening");
  options.weight_decay = setting<double>("weight_decay");
  options.nesterov = setting<int>("nesterov") != 0;
  return cuda::optim::sgd(step_tensors(options, {"momentum"}), nullptr);
}

cudaError_t call_adam() {
  AdamOptions options{};
  read_options(options);
  options.lr = setting<double>("lr");
  options.beta1 = setting<double>("beta1");
  options.beta2 = setting<double>("beta2");
  options.eps = setting<double>("eps");
  options.weight_decay = setting<double>("weight_decay");
  options.decoupled = setting<int>("decoupled") != 0;
  options.amsgrad = setting<int>("amsgrad") != 0;
  return cuda::optim::adam(step_tensors(options, {"mean", "square", "largest"}), nullptr);
}

// Of the buffers gradient0, gradient1, ..., into the buffer norm.
cudaError_t call_norm() {
  std::vector<Gradient> gradients;
  for (int i = 0; i < setting<int>("tensors"); ++i) {
    const auto number = std::to_string(i);
    const auto type = static_cast<ElementType>(setting<int>("type" + number));
    gradients.push_back({buffer("gradient" + number), setting<int64_t>("numel" + number), type});
  }
  const int64_t count = cuda::optim::count_of_square_sums(gradients);
  Buffer sums(count * sizeof(double), 0);
  auto* memory = reinterpret_cast<double*>(sums.data());
  if (const auto error = cuda::optim::square_sums(gradients, memory, nullptr); error != cudaSuccess) {
    return error;
  }
  const double factor = setting<double>("factor", 1);
  return cuda::optim::norm_of_square_sums(
      memory, count, factor, buffer<float>("scale_on_device"), buffer<double>("norm"), nullptr);
}

cudaError_t call(const std::string& function) {
  emulation::device.largest_cluster = setting<int>("largest_cluster", 16);
  emulation::order = static_cast<emulation::Order>(setting<int>("order"));
  emulation::reset();
  emulated_error = cudaSuccess;
  if (function == "cross_entropy") {
    return call_cross_entropy();
  }
  if (function == "add_slice") {
    return cuda::linear_cross_entropy::add_slice(linear_slice(), nullptr);
  }
  if (function == "slice_gradient") {
    return cuda::linear_cross_entropy::slice_gradient(linear_slice(), nullptr);
  }
  if (function == "scale_rows") {
    return call_scale_rows();
  }
  if (function == "sgd") {
    return call_sgd();
  }
  if (function == "adam") {
    return call_adam();
  }
  if (function == "norm") {
    return call_norm();
  }
  return cuda::fault(function, buffer<float>("out"));
}

}  // namespace

int main() {
  std::FILE* answers = fdopen(dup(STDOUT_FILENO), "wb");
  dup2(STDERR_FILENO, STDOUT_FILENO);
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string request, name;
    words >> request >> name;
    if (request == "buffer") {
      size_t bytes = 0, offset = 0;
      words >> bytes >> offset;
      auto& made = buffers.try_emplace(name, bytes, offset).first->second;
      std::cin.read(made.data(), static_cast<std::streamsize>(bytes));
    } else if (request == "set") {
      words >> settings[name];
    } else if (request == "call") {
      const cudaError_t error = call(name);
      std::fflush(stdout);
      std::fprintf(answers, "done %d %lld\n", static_cast<int>(error), static_cast<long long>(emulation::launches()));
    } else if (request == "fetch") {
      Buffer& found = buffers.at(name);
      std::fwrite(found.data(), 1, found.bytes(), answers);
    } else {
      buffers.clear();
      settings.clear();
    }
    std::fflush(answers);
  }
}
