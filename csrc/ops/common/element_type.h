// The kernels' element types of torch's dtypes.
#pragma once

#include "../../kernels/common/element_type.h"

#include <c10/core/ScalarType.h>

#include <optional>

namespace lightkit {

// Returns nullopt for a dtype that no kernel takes.
inline std::optional<ElementType> element_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return ElementType::Float;
    case at::kDouble:
      return ElementType::Double;
    case at::kBFloat16:
      return ElementType::BFloat16;
    case at::kHalf:
      return ElementType::Half;
    default:
      return std::nullopt;
  }
}

}  // namespace lightkit
