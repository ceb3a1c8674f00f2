// The Python function that calls lightkit::cross_entropy.
#pragma once

#include "../common/python_object.h"

namespace lightkit {

Object cross_entropy_function();

}  // namespace lightkit
