// The checks of the float32 tensors of a decoder.
#pragma once

#include "../../kernels/cpu/decode/panels.h"
#include "../common/checks.h"
#include "../common/python_tensor.h"

#include <string>
#include <vector>

namespace lightkit {

// The weights that a constructor got, which own their memory meanwhile.
class DecoderWeights {
 public:
  // Returns the sizes of a tensor with so many dimensions, none of which is 0. Raises a ValueError or a TypeError
  // unless the tensor is a contiguous float32 tensor of them on the CPU.
  at::IntArrayRef sizes(const std::string& name, PyObject* object, int64_t dimensions);

  // Returns the elements of a tensor of these sizes. Raises as `sizes` does.
  const float* data(const std::string& name, PyObject* object, at::IntArrayRef sizes);

 private:
  std::vector<at::Tensor> tensors_;
};

// Returns the number of items of a list. Raises a ValueError unless it is a positive multiple of `multiple`, and a
// TypeError unless it is a list.
int64_t list_size(const char* name, PyObject* list, int64_t multiple);

// Returns the number of sequences. Raises a ValueError unless it is from 1 to 2^20, a limit below which no product of
// it with the sizes of tensors in memory overflows.
int64_t checked_sequences(int64_t sequences);

// Raises a ValueError unless the bits are 32 or 8.
cpu::decode::Precision precision_of(const char* name, int64_t bits);

}  // namespace lightkit
