// Places in the backward graph for ops that compute their gradients themselves, apart from torch's headers for it, which
// take every file that includes them 4 s to compile.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <memory>
#include <vector>

namespace lightkit {

class GraphNode;

// What an op does in backward: made in forward and given to `record`, it lives as long as its node of the graph.
class Backward {
 public:
  virtual ~Backward() = default;
  // As Python shows the node.
  virtual const char* name() const = 0;
  // Returns the gradient of each input that `record` was given, undefined for those that have none. `grad_output` may be
  // undefined. One call runs at a time.
  virtual std::vector<at::Tensor> apply(const at::Tensor& grad_output) = 0;
  // Lets go of tensors that it holds itself, when the graph is freed. The saved ones are the node's.
  virtual void release() {}

 protected:
  // One of the saved tensors, by its place. Raises where the graph has been freed, or the tensor changed in place.
  at::Tensor saved(size_t place) const;
  // Whether this backward needs the gradient of an input, by its place.
  bool is_wanted(size_t input) const;

 private:
  friend class GraphNode;
  GraphNode* node_ = nullptr;
};

// Makes `output` the result of an operation on `inputs`. `saved` are kept for backward as torch keeps them. Raises a
// NotImplementedError for inputs with forward-mode tangents.
void record(
    const at::Tensor& output, std::unique_ptr<Backward> backward, at::TensorList inputs, at::TensorList saved);

// The gradients of `output` with respect to `inputs`, as torch.autograd.grad returns them.
std::vector<at::Tensor> differentiate(
    const at::Tensor& output, at::TensorList inputs, const at::Tensor& grad_output, bool create_graph);

// `gradient`, computed in forward, times what backward brings. Its memory goes to the result and `gradient` is
// undefined afterwards, unless this backward keeps the graph for another one, or brings several to multiply it with.
at::Tensor take_gradient(at::Tensor& gradient, const at::Tensor& upstream);

// Whether operations on `tensor` run now on its memory, rather than being recorded by a tracer.
inline bool is_concrete(const at::Tensor& tensor) {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      !tensor.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

// Whether `tensor` stands for several: within torch.func.vmap, or in a backward with is_grads_batched=True.
inline bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

}  // namespace lightkit
