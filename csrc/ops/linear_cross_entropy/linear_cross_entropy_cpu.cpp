// lightkit::linear_cross_entropy on a CPU: checks of the targets, removal of ignored rows, memory, and the kernel.

#include "../../kernels/cpu/linear_cross_entropy/linear_cross_entropy.h"
#include "../common/checks.h"
#include "linear_cross_entropy.h"

#include <algorithm>
#include <vector>

namespace lightkit {
namespace {

using at::Tensor;

template <typename T>
T* mutable_data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// Returns a given tensor in the accumulation type, contiguous; else an undefined tensor.
template <typename acc_t>
Tensor as_accumulators(const std::optional<Tensor>& tensor) {
  return is_there(tensor) ? tensor->to(c10::CppTypeToScalarType<acc_t>::value).contiguous() : Tensor();
}

// The rows that count, one after the other. Rows whose target is ignore_index are not computed.
template <typename scalar_t>
struct Rows {
  using acc_t = cpu::accumulator_t<scalar_t>;

  Rows(const LinearInputs& inputs, const CrossEntropyOptions& options)
      : total(inputs.hidden.size(0)), weight(as_accumulators<acc_t>(inputs.weight)) {
    const int64_t classes = inputs.linear_weight.size(0);
    const Tensor given = inputs.target.to(at::kLong).contiguous();
    const int64_t* targets = given.const_data_ptr<int64_t>();
    const acc_t* weights = data_or_null<acc_t>(weight);
    std::vector<int64_t> kept;
    kept.reserve(total);
    for (int64_t row = 0; row < total; ++row) {
      if (targets[row] == options.ignore_index) {
        continue;
      }
      TORCH_CHECK_INDEX(
          targets[row] >= 0 && targets[row] < classes,
          "linear_cross_entropy: Target ",
          targets[row],
          " is out of bounds: row ",
          row,
          " of the target must name one of the ",
          classes,
          " classes (0 to ",
          classes - 1,
          ") or be ignore_index (",
          options.ignore_index,
          ")");
      kept.push_back(row);
      denominator += weights == nullptr ? 1 : static_cast<double>(weights[targets[row]]);
    }
    count = static_cast<int64_t>(kept.size());
    if (count < total) {
      index = empty({count}, at::kLong);
      std::copy(kept.begin(), kept.end(), index.mutable_data_ptr<int64_t>());
      hidden = inputs.hidden.index_select(0, index);
      target = given.index_select(0, index);
    } else {
      hidden = inputs.hidden.contiguous();
      target = given;
    }
  }

  // Spreads `values` of the rows that count to all rows along `dim`; the others are 0.
  Tensor spread(const Tensor& values, int64_t dim = 0) const {
    if (count == total) {
      return values;
    }
    auto sizes = values.sizes().vec();
    sizes[dim] = total;
    return zeros(sizes, values.options()).index_copy_(dim, index, values);
  }

  // Picks the values of the rows that count along `dim`.
  Tensor pick(const Tensor& values, int64_t dim = 0) const {
    return (count < total ? values.index_select(dim, index) : values).contiguous();
  }

  int64_t total;
  Tensor weight;  // [classes], or undefined
  int64_t count;
  Tensor index;   // [count], undefined if every row counts
  Tensor hidden;  // [count, features], contiguous
  Tensor target;  // [count]
  double denominator = 0;
};

template <typename scalar_t>
cpu::linear_cross_entropy::Problem<scalar_t> make_arguments(
    const Rows<scalar_t>& rows, const Tensor& head, const Tensor& bias, const CrossEntropyOptions& options) {
  using acc_t = cpu::accumulator_t<scalar_t>;
  cpu::linear_cross_entropy::Problem<scalar_t> args{};
  args.hidden = rows.hidden.template const_data_ptr<scalar_t>();
  args.linear_weight = head.const_data_ptr<scalar_t>();
  args.linear_bias = data_or_null<acc_t>(bias);
  args.rows = rows.count;
  args.features = head.size(1);
  args.classes = head.size(0);
  args.target = rows.target.template const_data_ptr<int64_t>();
  args.weight = data_or_null<acc_t>(rows.weight);
  args.smoothing = static_cast<acc_t>(options.label_smoothing);
  args.z_loss = static_cast<acc_t>(options.z_loss);
  args.softcap = static_cast<acc_t>(options.softcap);
  return args;
}

// Returns pointers into `known` [3, rows], contiguous.
template <typename acc_t>
cpu::linear_cross_entropy::RowStatistics<acc_t> as_statistics(const Tensor& known) {
  acc_t* data = known.mutable_data_ptr<acc_t>();
  return {data, data + known.size(1), data + 2 * known.size(1)};
}

// Runs the kernel in a workspace.
template <typename scalar_t>
void run(cpu::linear_cross_entropy::Problem<scalar_t>& args, int64_t memory_limit) {
  args.memory_limit = memory_limit;
  const int64_t bytes = cpu::linear_cross_entropy::workspace_bytes(args);
  const Tensor workspace = pooled_empty({bytes}, at::TensorOptions(at::kByte));
  args.workspace = reinterpret_cast<char*>(workspace.mutable_data_ptr());
  cpu::linear_cross_entropy::run(args);
}

// The gradients, which the kernel writes through the pointers in its arguments.
template <typename scalar_t>
class Gradients {
  using acc_t = cpu::accumulator_t<scalar_t>;

 public:
  Gradients(
      const Rows<scalar_t>& rows,
      const LinearInputs& inputs,
      const WantedGradients& wanted,
      const Tensor& scale,
      cpu::linear_cross_entropy::Problem<scalar_t>& args)
      : rows_(rows), inputs_(inputs) {
    // Without rows the kernel writes nothing.
    const auto make = [&](at::IntArrayRef sizes, const at::TensorOptions& options) {
      return rows.count == 0 ? zeros(sizes, options) : pooled_empty(sizes, options);
    };
    const auto options = inputs.hidden.options();
    if (wanted.hidden) {
      hidden_ = make(rows.hidden.sizes(), options);
    }
    if (wanted.linear_weight) {
      linear_weight_ = make(inputs.linear_weight.sizes(), options);
    }
    if (wanted.linear_bias) {
      linear_bias_ = make({inputs.linear_weight.size(0)}, options.dtype(c10::CppTypeToScalarType<acc_t>::value));
    }
    args.gradient_scale = scale.const_data_ptr<acc_t>();
    args.hidden_gradient = mutable_data_or_null<scalar_t>(hidden_);
    args.weight_gradient = mutable_data_or_null<scalar_t>(linear_weight_);
    args.bias_gradient = mutable_data_or_null<acc_t>(linear_bias_);
  }

  LinearGradients result() const {
    auto [hidden, linear_weight, linear_bias] = no_gradients(inputs_.hidden.options());
    return {
        hidden_.defined() ? rows_.spread(hidden_) : hidden,
        linear_weight_.defined() ? linear_weight_ : linear_weight,
        linear_bias_.defined() ? linear_bias_.to(inputs_.linear_bias->scalar_type()) : linear_bias};
  }

 private:
  const Rows<scalar_t>& rows_;
  const LinearInputs& inputs_;
  Tensor hidden_, linear_weight_, linear_bias_;
};

template <typename scalar_t>
LinearResults forward(
    const LinearInputs& inputs,
    const CrossEntropyOptions& options,
    int64_t memory_limit,
    const WantedGradients& wanted) {
  using acc_t = cpu::accumulator_t<scalar_t>;
  const Rows<scalar_t> rows(inputs, options);
  const Tensor head = inputs.linear_weight.contiguous();
  const Tensor bias = as_accumulators<acc_t>(inputs.linear_bias);
  auto args = make_arguments(rows, head, bias, options);
  const auto acc_options = inputs.hidden.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  const Tensor losses = empty({rows.count}, acc_options), known = empty({3, rows.count}, acc_options);
  args.losses = losses.mutable_data_ptr<acc_t>();
  args.row_statistics = as_statistics<acc_t>(known);

  const bool mean = options.reduction == Reduction::Mean;
  const double scale = mean && rows.count > 0 ? 1 / rows.denominator : 1;
  LinearGradients gradients = no_gradients(head.options());
  if (wanted.any()) {
    const Tensor scales = full({rows.count}, scale, acc_options);
    const Gradients<scalar_t> written(rows, inputs, wanted, scales, args);
    run(args, memory_limit);
    gradients = written.result();
  } else {
    run(args, memory_limit);
  }

  const auto loss_type = options.dtype.value_or(inputs.hidden.scalar_type());
  Tensor loss;
  if (options.reduction == Reduction::None) {
    loss = rows.spread(losses).to(loss_type);
  } else {
    // In double, one after the other: the loss does not depend on the number of threads.
    double sum = 0;
    for (int64_t row = 0; row < rows.count; ++row) {
      sum += args.losses[row];
    }
    loss = full({}, mean ? sum / rows.denominator : sum, inputs.hidden.options().dtype(loss_type));
  }
  auto& [of_hidden, of_weight, of_bias] = gradients;
  return {loss, rows.spread(known, /*dim=*/1), of_hidden, of_weight, of_bias};
}

template <typename scalar_t>
LinearGradients backward(
    const Tensor& grad_loss,
    const Tensor& row_statistics,
    const LinearInputs& inputs,
    const CrossEntropyOptions& options,
    int64_t memory_limit,
    const WantedGradients& wanted) {
  using acc_t = cpu::accumulator_t<scalar_t>;
  constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
  const Rows<scalar_t> rows(inputs, options);
  const Tensor head = inputs.linear_weight.contiguous();
  const Tensor bias = as_accumulators<acc_t>(inputs.linear_bias);
  auto args = make_arguments(rows, head, bias, options);
  const Tensor known = rows.pick(row_statistics, /*dim=*/1);
  args.row_statistics = as_statistics<acc_t>(known);
  Tensor scales = grad_loss.to(acc_type);
  if (options.reduction == Reduction::None) {
    scales = rows.pick(scales);
  } else {
    const Tensor scale = options.reduction == Reduction::Mean ? scales / rows.denominator : scales;
    scales = scale.expand({rows.count}).contiguous();
  }
  const Gradients<scalar_t> written(rows, inputs, wanted, scales, args);
  run(args, memory_limit);
  return written.result();
}

// Calls function(scalar_t()) with the element type.
template <typename Function>
auto with_type(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kFloat:
      return function(float());
    case at::kDouble:
      return function(double());
    case at::kBFloat16:
      return function(at::BFloat16());
    default:
      return function(at::Half());
  }
}

}  // namespace

LinearResults linear_forward_cpu(
    LIGHTKIT_LINEAR_PARAMETERS, LIGHTKIT_OPTION_PARAMETERS, int64_t memory_limit, LIGHTKIT_WANTED_PARAMETERS) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  check_memory(inputs);
  return with_type(hidden.scalar_type(), [&](auto value) {
    return forward<decltype(value)>(inputs, options, memory_limit, wanted);
  });
}

LinearGradients linear_backward_cpu(
    const Tensor& grad_loss,
    const Tensor& row_statistics,
    LIGHTKIT_LINEAR_PARAMETERS,
    LIGHTKIT_OPTION_PARAMETERS,
    int64_t memory_limit,
    LIGHTKIT_WANTED_PARAMETERS) {
  const LinearInputs inputs{LIGHTKIT_LINEAR_ARGUMENTS};
  const auto options = make_options(LIGHTKIT_OPTION_ARGUMENTS);
  const WantedGradients wanted{LIGHTKIT_WANTED_ARGUMENTS};
  check_kernel_arguments(inputs, options, memory_limit, wanted);
  check_backward_arguments(grad_loss, row_statistics, inputs, options);
  check_memory(inputs);
  check_memory("linear_cross_entropy", "grad_loss", grad_loss);
  check_memory("linear_cross_entropy", "row_statistics", row_statistics);
  return with_type(hidden.scalar_type(), [&](auto value) {
    return backward<decltype(value)>(grad_loss, row_statistics, inputs, options, memory_limit, wanted);
  });
}

}  // namespace lightkit
