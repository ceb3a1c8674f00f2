// What the nodes of the backward graph share that compute their gradients in forward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace lightkit {

// Whether operations on `tensor` run now on its memory, rather than being recorded by a tracer.
inline bool is_concrete(const at::Tensor& tensor) {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      !tensor.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

// torch counts the references of a node in itself from 2.13 on, and with std::shared_ptr before.
template <typename T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) {
    return c10::make_intrusive<T>();
  } else {
    return std::make_shared<T>();
  }
}

// Whether `tensor` stands for several: within torch.func.vmap, or in a backward with is_grads_batched=True.
inline bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

// `gradient`, computed in forward, times what backward brings. Its memory goes to the result and `gradient` is
// undefined afterwards, unless this backward keeps the graph for another one, or brings several to multiply it with.
inline at::Tensor take_gradient(at::Tensor& gradient, const at::Tensor& upstream) {
  if (!is_concrete(gradient) || is_batched(upstream) || torch::autograd::get_current_graph_task_keep_graph()) {
    return (gradient * upstream).to(gradient.scalar_type());
  }
  static const auto apply_upstream = c10::Dispatcher::singleton()
                                         .findSchemaOrThrow("lightkit::_apply_upstream_", "")
                                         .typed<at::Tensor&(at::Tensor&, const at::Tensor&)>();
  at::Tensor taken = std::exchange(gradient, at::Tensor());
  return apply_upstream.call(taken, upstream);
}

}  // namespace lightkit
