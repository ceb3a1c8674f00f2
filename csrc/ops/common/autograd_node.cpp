#include "autograd_node.h"

#include "../cross_entropy/cross_entropy.h"

#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

namespace lightkit {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Not a torch::autograd::Function, whose bookkeeping takes longer than a small loss.
class GraphNode : public torch::autograd::Node {
 public:
  void set(std::unique_ptr<Backward> backward, at::TensorList inputs, at::TensorList saved) {
    backward_ = std::move(backward);
    backward_->node_ = this;
    torch::autograd::edge_list edges;
    edges.reserve(inputs.size());
    for (const Tensor& input : inputs) {
      edges.push_back(input.defined() ? torch::autograd::impl::gradient_edge(input) : torch::autograd::Edge());
    }
    set_next_edges(std::move(edges));
    for (const Tensor& tensor : saved) {
      saved_.emplace_back(tensor, /*is_output=*/false);
    }
  }

  Tensor saved(size_t index) const {
    return saved_[index].unpack();
  }

  variable_list apply(variable_list&& grad_outputs) override {
    const std::lock_guard lock(mutex_);
    return backward_->apply(grad_outputs[0]);
  }

  std::string name() const override {
    return backward_->name();
  }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (SavedVariable& saved : saved_) {
      saved.reset_data();
    }
    backward_->release();
  }

 private:
  std::unique_ptr<Backward> backward_;
  c10::SmallVector<SavedVariable, 6> saved_;
};

namespace {

// From torch 2.13 on a node counts its own references; before, std::shared_ptr counts them.
template <typename T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) {
    return c10::make_intrusive<T>();
  } else {
    return std::make_shared<T>();
  }
}

}  // namespace

Tensor Backward::saved(size_t index) const {
  return node_->saved(index);
}

bool Backward::is_wanted(size_t input) const {
  return node_->task_should_compute_output(input);
}

bool Backward::is_observed(size_t input) const {
  torch::autograd::Node* const node = node_->next_edge(input).function.get();
  if (!node->pre_hooks().empty() || !node->post_hooks().empty() || !node->tensor_pre_hooks().empty() ||
      !node->retains_grad_hooks().empty()) {
    return true;
  }
  // Empty for Tensor.backward() without `inputs`.
  const auto* const tasks = torch::autograd::get_current_graph_task_exec_info();
  if (tasks == nullptr) {
    return false;
  }
  const auto found = tasks->find(node);
  return found != tasks->end() && found->second.captures_ != nullptr;
}

Tensor in_place_of_input(const Tensor& output) {
  Tensor moved = output.variable_data();
  torch::autograd::impl::set_version_counter(moved, torch::autograd::impl::version_counter(output));
  torch::autograd::impl::set_gradient_edge(moved, output.grad_fn()->next_edge(0));
  return moved;
}

void record(const Tensor& output, std::unique_ptr<Backward> backward, at::TensorList inputs, at::TensorList saved) {
  for (const Tensor& input : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !input.defined() || !input._fw_grad(/*level=*/0).defined(),
        backward->name(),
        ": forward-mode differentiation is not implemented for lightkit's kernels");
  }
  const auto node = make_node<GraphNode>();
  node->set(std::move(backward), inputs, saved);
  torch::autograd::set_history(output, node);
}

std::vector<Tensor> differentiate(
    const Tensor& output, at::TensorList inputs, const Tensor& grad_output, bool create_graph) {
  return torch::autograd::grad({output}, inputs.vec(), {grad_output}, /*retain_graph=*/std::nullopt, create_graph);
}

bool is_direct(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet plain(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  constexpr c10::DispatchKeySet watching(
      {DispatchKey::Python,
       DispatchKey::PythonDispatcher,
       DispatchKey::PythonTLSSnapshot,
       DispatchKey::Functionalize,
       DispatchKey::FuncTorchDynamicLayerFrontMode,
       DispatchKey::FuncTorchDynamicLayerBackMode,
       DispatchKey::Tracer});
  return (tensor.key_set().raw_repr() & ~plain.raw_repr()) == 0 &&
      !c10::impl::tls_local_dispatch_key_set().included_.has_any(watching) &&
      !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::hasCallbacks();
}

Tensor take_gradient(Tensor& gradient, const Tensor& upstream) {
  if (!is_concrete(gradient) || is_batched(upstream) || torch::autograd::get_current_graph_task_keep_graph()) {
    return gradient.mul(upstream).to(gradient.scalar_type());
  }
  Tensor taken = std::exchange(gradient, Tensor());
  return is_direct(taken) && is_direct(upstream) ? apply_upstream_cpu(taken, upstream)
                                                 : call_apply_upstream(taken, upstream);
}

}  // namespace lightkit
