"""Thresholds of the ops, each with the rows of benchmarks/results that it was measured with or its derivation.

"Between" two rows means that the threshold was set between them and that no row lies nearer. The rows of
conv_relu_pool.csv were measured on two cores of a Xeon with AVX-512 and AMX. csrc/kernels/*/*/tuning.h has the tuned
constants of the kernels.
"""

from __future__ import annotations

# A layer has so many weights, or so many values of images and channels, at most: the kernels index them with 32 bits.
# Derived: csrc/ops/layer_chain/layer_chain_checks.cpp refuses weights of 2^26 values, and images of 2^30 values; half
# of that leaves room for the padding.
MAX_WEIGHTS = 1 << 26
MAX_IMAGE = 1 << 29

# A linear layer joins a chain behind convolutions with at most so many weights. conv_relu_pool.csv: alone, linear
# layers are slower than torch's ("linear 784-128-10" is 0.54 to 0.64 times as fast, "linear 1024-512-10" 0.39 to 0.45
# times). Behind convolutions they save an autograd node and a trip through memory, which pays for small layers. The
# value was chosen, and not measured in a chain.
MAX_LINEAR_WEIGHTS = 1 << 17

# A convolution without a pool is faster on the kernel with at most so many pixels of its input and so many weights.
# conv_relu_pool.csv, float32, in times of torch's contiguous layers (in brackets channels-last ones): "64 -> 64, 5x5"
# (25 pixels, 2^15.2 weights) is 1.88 to 2.05 (1.01 to 1.12), "64 -> 64, 32x32, padded" (1024 pixels) 1.15 to 1.39 (1.20
# to 1.47), "128 -> 128, 8x8, padded" (2^17.2 weights) 0.91 to 0.98 (0.95 to 1.08). The pixels are those of the largest
# row, the weights lie between the last two.
MAX_UNPOOLED_PIXELS = 1024
MAX_UNPOOLED_WEIGHTS = 1 << 16

# On a processor that multiplies bfloat16, a layer runs on the kernel if pixels times weights are at most this.
# conv_relu_pool.csv, bfloat16, in times of torch's contiguous layers (in brackets channels-last ones): "64 -> 64, 5x5"
# (2^19.8) is 1.45 to 1.87 (1.18 to 1.25), "32 -> 64, 13x13, pool" (2^21.6) 1.50 to 2.09 (1.87 to 2.37), "64 -> 128,
# 16x16, padded, pool" (2^24.2) 0.82 to 1.21 (2.33 to 2.90). Between the last two rows; channels-last was not counted.
MAX_BFLOAT16_PRODUCTS = 1 << 22

# A convolution is faster on `conv2d`'s kernel than in torch with at most so many weights. conv2d.csv, float32, forward
# and backward, in times of the faster of torch's contiguous and channels-last ones: "128 -> 128, 8x8, 3x3" (2^17.2) is
# 1.39, "256 -> 256, 8x8, 3x3" (2^19.2) 0.67. Between these rows.
MAX_CONV2D_WEIGHTS = 1 << 18

# A convolution of several groups is faster with at least so many channels of input and of output in each group.
# conv2d.csv: "64 -> 64, 16x16, 3x3" in 2 groups is 1.12, in 8 groups 0.51, depthwise 0.96. Between the first two.
MIN_CONV2D_GROUP = 16

# A convolution without dilation is faster with at most so many taps. conv2d.csv: "6 -> 16, 14x14, 5x5" is 1.60, "3 ->
# 64, 112x112, 7x7, stride 2" 1.13, and was below 1 in other runs. With dilation 2, "64 -> 64, 16x16, 3x3" is 1.03.
MAX_CONV2D_TAPS = 25

# Behind a normalization without a pool, torch computes the functions whose derivative costs more from the values before
# them than from those behind. activations.csv, in times of "norm alone", where torch computes them: tanh is 0.75 to
# 0.98, softplus 0.96 to 1.14, the others are 0.95 to 1.91, and with a pool all are 1.10 to 2.28. The rows of
# activations.csv and nll_loss.csv were measured on a crowded machine.
SLOW_ACTIVATIONS = frozenset({"tanh", "softplus"})

# Without a normalization these functions are faster on the kernel in front of a pool. activations.csv, in times of
# torch on channels-last tensors: they are 1.08 to 2.50, each of the others is 1.00 or less in a row.
POOLED_ACTIVATIONS = frozenset({"elu", "gelu_tanh", "tanh"})

# Alone, as behind a linear layer, GELU approximated by tanh is faster on the kernel with at least so many values, in
# rows of so many. activations.csv, in times of torch's, forward and backward on one thread of a crowded machine:
# 64 x 128 is 0.88, 64 x 512 1.10, 2048 x 512 1.79. At the second; the size of the rows was chosen. Each of the other
# functions is 0.95 or less with 2048 x 512: torch computes them.
MIN_GELU_TANH = 1 << 15
MIN_GELU_TANH_CHANNELS = 64

# The negative log-likelihood of a log-softmax has at least so many log-probabilities. nll_loss.csv, in times of torch's
# two functions, forward and backward: 256 x 100 (2^14.6) is 0.89, 4096 x 10 (2^15.3) 1.42, 128 x 1000 1.18. Between the
# first two rows.
MIN_NLL_LOSS = 1 << 15

# A convolution of sequences is faster on `conv2d`'s kernel, as one of images of height 1, with at most so many weights.
# conv1d.csv, in times of torch's: "64 -> 64, 64 x 128, 5 taps" (2^14.3 weights) is 1.13, "64 -> 128, 32 x 64, 3 taps,
# stride 2" (2^14.6) 1.30, "128 -> 128, 32 x 128, 3 taps" (2^15.6) 0.91. Between the last two. The rows were measured on
# a crowded machine.
MAX_CONV1D_WEIGHTS = 1 << 15

# The bytes that linear_cross_entropy may take beyond its inputs and results, by default. linear_cross_entropy.csv was
# measured with this value; it was chosen, and not measured otherwise.
MEMORY_LIMIT = 64 << 20

# A dropout has at least so many elements: a smaller one costs a call of the op more than torch's. Chosen.
MIN_DROPOUT = 1 << 10
