// Nodes of the autograd graph for ops that compute their own gradients. torch's headers are left to the .cpp file: a
// file takes 4 s more to compile with them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <memory>
#include <vector>

namespace lightkit {

class GraphNode;

// The backward of an op. forward makes it and gives it to `record`; it lives as long as its node of the graph.
class Backward {
 public:
  virtual ~Backward() = default;
  // The name that Python shows.
  virtual const char* name() const = 0;
  // Returns the gradients of the inputs that `record` was given, undefined for an input without one. `grad_output` may
  // be undefined. One call runs at a time.
  virtual std::vector<at::Tensor> apply(const at::Tensor& grad_output) = 0;
  // Frees the tensors that this object holds, when the graph is freed. The node frees the saved tensors.
  virtual void release() {}

 protected:
  // Returns the saved tensor at an index. Raises if the graph was freed, or the tensor was changed in place.
  at::Tensor saved(size_t index) const;
  // Returns true if this backward needs the gradient of the input at an index.
  bool is_wanted(size_t input) const;
  // Returns true if a program observes the gradient of the input at an index, which an operation computed: by a hook of
  // the tensor or its node, by retain_grad, or as an argument of torch.autograd.grad.
  bool is_observed(size_t input) const;

 private:
  friend class GraphNode;
  GraphNode* node_ = nullptr;
};

// Records `output` as the result of an op on `inputs`, with `saved` tensors for backward. Raises a NotImplementedError
// for inputs with forward-mode tangents.
void record(const at::Tensor& output, std::unique_ptr<Backward> backward, at::TensorList inputs, at::TensorList saved);

// Returns the values of `output` as a tensor whose place in the graph is that of the one input of the node that
// computed `output`: gradients of the returned tensor are gradients of that input. Both share their memory and its
// version.
at::Tensor in_place_of_input(const at::Tensor& output);

// Returns the gradients of `output` with respect to `inputs`, as torch.autograd.grad does.
std::vector<at::Tensor> differentiate(
    const at::Tensor& output, at::TensorList inputs, const at::Tensor& grad_output, bool create_graph);

// Returns a gradient that forward computed, times the upstream gradient. The result takes the memory of `gradient`,
// which is then undefined, unless this backward keeps the graph or has a batch of upstream gradients.
at::Tensor take_gradient(at::Tensor& gradient, const at::Tensor& upstream);

// Returns true if ops on `tensor` run now on its memory, and are not recorded by a tracer.
inline bool is_concrete(const at::Tensor& tensor) {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      !tensor.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

// Returns true if an op may call the kernels of a CPU on `tensor` without the dispatcher: nothing there changes the
// call or takes note of it. The dispatcher's calls take a third of the time of a small op.
bool is_direct(const at::Tensor& tensor);

// Returns true if `tensor` is a batch of tensors, of torch.func.vmap or of a backward with is_grads_batched=True.
inline bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

}  // namespace lightkit
