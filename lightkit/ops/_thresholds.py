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
# to 1.47), "128 -> 128, 8x8, padded" (2^17.2 weights) 0.91 to 0.98 (0.95 to 1.08). Between these rows.
MAX_UNPOOLED_PIXELS = 256
MAX_UNPOOLED_WEIGHTS = 1 << 16

# On a processor that multiplies bfloat16, a layer runs on the kernel if pixels times weights are at most this.
# conv_relu_pool.csv, bfloat16, in times of torch's contiguous layers (in brackets channels-last ones): "64 -> 64, 5x5"
# (2^19.8) is 1.45 to 1.87 (1.18 to 1.25), "32 -> 64, 13x13, pool" (2^21.6) 1.50 to 2.09 (1.87 to 2.37), "64 -> 128,
# 16x16, padded, pool" (2^24.2) 0.82 to 1.21 (2.33 to 2.90). Between the last two rows; channels-last was not counted.
MAX_BFLOAT16_PRODUCTS = 1 << 22

# The bytes that linear_cross_entropy may take beyond its inputs and results, by default. linear_cross_entropy.csv was
# measured with this value; it was chosen, and not measured otherwise.
MEMORY_LIMIT = 64 << 20
