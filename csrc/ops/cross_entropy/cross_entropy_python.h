// The Python functions of lightkit::cross_entropy, and of the negative log-likelihood of a log-softmax.
#pragma once

#include "../common/python_object.h"

namespace lightkit {

Object cross_entropy_function();
Object nll_loss_function();

}  // namespace lightkit
