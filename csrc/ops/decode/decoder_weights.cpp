#include "decoder_weights.h"

namespace lightkit {

using at::Tensor;

at::IntArrayRef DecoderWeights::sizes(const std::string& name, PyObject* object, int64_t dimensions) {
  TORCH_CHECK_TYPE(
      is_exact_tensor(object), "decoder: ", name, " must be a torch.Tensor, got an object of ", class_name(object));
  const Tensor tensor = tensor_of(object);
  TORCH_CHECK_VALUE(
      tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == at::kFloat,
      "decoder: ",
      name,
      " must be float32 on the CPU, got ",
      tensor.scalar_type(),
      " on ",
      tensor.device());
  TORCH_CHECK_VALUE(
      tensor.is_contiguous() && !tensor.is_neg(),
      "decoder: ",
      name,
      " must be contiguous, got strides ",
      tensor.strides());
  TORCH_CHECK_VALUE(
      tensor.dim() == dimensions && tensor.numel() > 0,
      "decoder: ",
      name,
      " must have ",
      dimensions,
      " dimensions of size 1 and more, got ",
      tensor.sizes());
  check_memory("decoder", name.c_str(), tensor);
  tensors_.push_back(tensor);
  return tensors_.back().sizes();
}

const float* DecoderWeights::data(const std::string& name, PyObject* object, at::IntArrayRef wanted) {
  const at::IntArrayRef given = sizes(name, object, static_cast<int64_t>(wanted.size()));
  TORCH_CHECK_VALUE(given == wanted, "decoder: ", name, " must have the shape ", wanted, ", got ", given);
  return tensors_.back().const_data_ptr<float>();
}

int64_t list_size(const char* name, PyObject* list, int64_t multiple) {
  TORCH_CHECK_TYPE(PyList_Check(list), "decoder: ", name, " must be a list, got an object of ", class_name(list));
  const int64_t size = PyList_Size(list);
  TORCH_CHECK_VALUE(
      size > 0 && size % multiple == 0,
      "decoder: ",
      name,
      " must have a positive multiple of ",
      multiple,
      " items, got ",
      size);
  return size;
}

int64_t checked_sequences(int64_t sequences) {
  constexpr int64_t most = int64_t(1) << 20;
  TORCH_CHECK_VALUE(
      sequences >= 1 && sequences <= most, "decoder: sequences must be from 1 to ", most, ", got ", sequences);
  return sequences;
}

cpu::decode::Precision precision_of(const char* name, int64_t bits) {
  TORCH_CHECK_VALUE(bits == 32 || bits == 8, "decoder: the bits of ", name, " must be 32 or 8, got ", bits);
  return bits == 32 ? cpu::decode::Precision::Float : cpu::decode::Precision::Int8;
}

}  // namespace lightkit
