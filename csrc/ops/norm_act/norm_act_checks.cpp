// Checks of the arguments of lightkit::norm_act, and the memory of its results.

#include "../../kernels/cpu/norm_act/activation.h"
#include "norm_act.h"

namespace lightkit {

using at::Tensor;
using c10::SymInt;

namespace {

constexpr auto op = "norm_act";

// Images have fewer values, so that no product of sizes overflows 64 bits. Chosen.
constexpr double kMaxValues = static_cast<double>(int64_t(1) << 60);

// Checks a tensor of one value a channel.
void check_of_channels(
    const char* name, const std::optional<Tensor>& tensor, const Tensor& input, const SymInt& channels) {
  if (!is_there(tensor)) {
    return;
  }
  TORCH_CHECK_VALUE(
      tensor->dim() == 1 && tensor->sym_size(0) == channels,
      op,
      ": ",
      name,
      " must have one value for each of the ",
      channels,
      " channels, got shape ",
      tensor->sym_sizes());
  check_same_kind(op, name, *tensor, input);
}

void check_residual(const std::optional<Tensor>& residual, const Tensor& input) {
  if (!is_there(residual)) {
    return;
  }
  TORCH_CHECK_VALUE(
      residual->sym_sizes() == input.sym_sizes(),
      op,
      ": the residual must have the shape of the input, ",
      input.sym_sizes(),
      ", got ",
      residual->sym_sizes());
  check_same_kind(op, "the residual", *residual, input);
}

NormSizes check_input(const Tensor& input, int64_t activation, int64_t pool) {
  using cpu::norm_act::Pool;
  constexpr auto last = static_cast<int64_t>(cpu::norm_act::Kind::Last);
  TORCH_CHECK_VALUE(
      activation >= 0 && activation <= last,
      op,
      ": activation must be a number from 0 to ",
      last,
      ", got ",
      activation);
  constexpr auto last_pool = static_cast<int64_t>(Pool::Last);
  TORCH_CHECK_VALUE(
      pool >= 0 && pool <= last_pool, op, ": pool must be a number from 0 to ", last_pool, ", got ", pool);
  check_single_or_double(op, input);
  const bool is_image = input.dim() == 4;
  TORCH_CHECK_VALUE(
      is_image || input.dim() == 2, op, ": the input must have 2 or 4 dimensions, got shape ", input.sym_sizes());
  TORCH_CHECK_VALUE(
      is_image || pool == 0, op, ": a pool takes an input of 4 dimensions, got shape ", input.sym_sizes());
  const SymInt one(1);
  const NormSizes sizes{
      input.sym_size(0),
      input.sym_size(1),
      is_image ? input.sym_size(2) : one,
      is_image ? input.sym_size(3) : one,
      is_image,
      activation == static_cast<int64_t>(cpu::norm_act::Kind::Relu),
      static_cast<Pool>(pool)};
  double values = 1;
  for (const SymInt& size : input.sym_sizes()) {
    TORCH_CHECK_VALUE(size > 0, op, ": the input must not be empty, got shape ", input.sym_sizes());
    if (const auto known = size.maybe_as_int()) {
      values *= static_cast<double>(*known);
    }
  }
  TORCH_CHECK_VALUE(
      values < kMaxValues, op, ": inputs of fewer than 2^60 values are supported, got shape ", input.sym_sizes());
  TORCH_CHECK_VALUE(
      sizes.pool != Pool::Max || (sizes.height >= 2 && sizes.width >= 2),
      op,
      ": images of ",
      sizes.height,
      "x",
      sizes.width,
      " are too small for a pool of 2x2");
  return sizes;
}

}  // namespace

std::vector<SymInt> NormSizes::output() const {
  if (!is_image) {
    return {images, channels};
  }
  switch (pool) {
    case cpu::norm_act::Pool::None:
      return {images, channels, height, width};
    case cpu::norm_act::Pool::Max:
      return {images, channels, height / 2, width / 2};
    case cpu::norm_act::Pool::Mean:
      return {images, channels, SymInt(1), SymInt(1)};
  }
  return {};
}

std::vector<SymInt> NormSizes::live() const {
  if (pool == cpu::norm_act::Pool::Max) {
    return {images * (height / 2) * (width / 2), channels};
  }
  return relu ? std::vector<SymInt>{images * height * width, (channels + 7) / 8} : std::vector<SymInt>{0};
}

NormSizes check_norm(LIGHTKIT_NORM_PARAMETERS) {
  const NormSizes sizes = check_input(input, activation, pool);
  check_of_channels("weight", weight, input, sizes.channels);
  check_of_channels("bias", bias, input, sizes.channels);
  check_of_channels("running_mean", running_mean, input, sizes.channels);
  check_of_channels("running_var", running_var, input, sizes.channels);
  TORCH_CHECK_VALUE(
      is_there(running_mean) == is_there(running_var),
      op,
      ": running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK_VALUE(
      training || is_there(running_mean), op, ": running_mean and running_var must be given if training is False");
  TORCH_CHECK_VALUE(training || !is_there(statistics), op, ": statistics must be None if training is False");
  if (is_there(statistics)) {
    TORCH_CHECK_VALUE(
        statistics->dim() == 2 && statistics->sym_size(0) == 2 && statistics->sym_size(1) == sizes.channels,
        op,
        ": statistics must have shape [2, ",
        sizes.channels,
        "], got ",
        statistics->sym_sizes());
    check_same_kind(op, "statistics", *statistics, input);
  }
  check_residual(residual, input);
  TORCH_CHECK_VALUE(
      !training || sizes.images * sizes.height * sizes.width != 1,
      "Expected more than 1 value per channel when training, got input size ",
      input.sym_sizes());
  TORCH_CHECK_VALUE(!training || eps > 0, op, ": eps must be positive in training, got ", eps);
  return sizes;
}

NormSizes check_norm_backward(
    const Tensor& grad_output,
    const Tensor& input,
    const std::optional<Tensor>& weight,
    const Tensor& kept,
    const Tensor& live,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual,
    int64_t activation,
    int64_t pool) {
  const NormSizes sizes = check_input(input, activation, pool);
  check_of_channels("weight", weight, input, sizes.channels);
  check_of_channels("bias", bias, input, sizes.channels);
  check_residual(residual, input);
  check_same_kind(op, "the gradient", grad_output, input);
  check_same_kind(op, "`kept`", kept, input);
  const auto output = sizes.output();
  const auto live_sizes = sizes.live();
  const std::vector<SymInt> kept_sizes{2, sizes.channels};
  TORCH_CHECK_VALUE(
      grad_output.sym_sizes() == output && kept.sym_sizes() == kept_sizes && live.sym_sizes() == live_sizes &&
          live.scalar_type() == at::kByte && live.device() == input.device(),
      op,
      ": the gradient must have the shape of the output, ",
      at::SymIntArrayRef(output),
      ", and `kept` and `live` be what forward returned, of ",
      at::SymIntArrayRef(kept_sizes),
      " and ",
      at::SymIntArrayRef(live_sizes),
      " of Byte, got ",
      grad_output.sym_sizes(),
      ", ",
      kept.sym_sizes(),
      " and ",
      live.sym_sizes(),
      " of ",
      live.scalar_type());
  return sizes;
}

namespace {

Tensor allocate(bool is_wanted, at::SymIntArrayRef sizes, const at::TensorOptions& options) {
  const std::vector<SymInt> none{0};
  if (!is_wanted) {
    return empty_symint(none, options);
  }
  return sizes.size() == 4 ? empty_symint(sizes, options, kNormLayout) : empty_symint(sizes, options);
}

}  // namespace

NormResults allocate_norm_results(const Tensor& input, const NormSizes& sizes, bool keep) {
  const auto options = input.options();
  const std::vector<SymInt> kept{2, sizes.channels};
  return {
      allocate(true, sizes.output(), options),
      allocate(true, kept, options),
      allocate(keep, sizes.live(), options.dtype(at::kByte))};
}

NormGradients allocate_norm_gradients(
    const Tensor& input, const NormSizes& sizes, bool input_wanted, bool affine_wanted, bool residual_wanted) {
  const auto options = input.options();
  const std::vector<SymInt> of_channels{sizes.channels};
  return {
      allocate(input_wanted, input.sym_sizes(), options),
      allocate(affine_wanted, of_channels, options),
      allocate(affine_wanted, of_channels, options),
      allocate(residual_wanted, input.sym_sizes(), options)};
}

}  // namespace lightkit
