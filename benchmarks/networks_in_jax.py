"""Some of `networks` in JAX, with the Adam of Optax and one compiled function for a step; channels are last."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from timing import median
from torch.utils.data import DataLoader, TensorDataset


def _convolve(layer: Any, images: jax.Array) -> jax.Array:
    weight, bias = layer
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, weight, (1, 1), "VALID", dimension_numbers=dimensions) + bias


def _multiply(layer: Any, features: jax.Array) -> jax.Array:
    weight, bias = layer
    return features @ weight + bias


def _pool(images: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _flatten(images: jax.Array) -> jax.Array:
    return images.reshape(images.shape[0], -1)


def _drop(key: jax.Array, probability: float, features: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - probability, features.shape)
    return jnp.where(kept, features / (1 - probability), 0)


def _documented_cnn(layers: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    relu = jax.nn.relu
    features = _pool(relu(_convolve(layers[0], images)))
    features = _pool(relu(_convolve(layers[1], features)))
    features = _flatten(relu(_convolve(layers[2], features)))
    return _multiply(layers[4], relu(_multiply(layers[3], features)))


def _digits(layers: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    relu = jax.nn.relu
    first, second = jax.random.split(key)
    features = relu(_convolve(layers[1], relu(_convolve(layers[0], images))))
    features = _flatten(_drop(first, 0.25, _pool(features)))
    return _multiply(layers[3], _drop(second, 0.5, relu(_multiply(layers[2], features))))


def _small_colour(layers: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    relu = jax.nn.relu
    features = _pool(relu(_convolve(layers[0], images)))
    features = _flatten(_pool(relu(_convolve(layers[1], features))))
    features = relu(_multiply(layers[2], features))
    return _multiply(layers[4], relu(_multiply(layers[3], features)))


NETWORKS: dict[str, Callable[..., jax.Array]] = {
    "DocumentedCnn": _documented_cnn,
    "Digits": _digits,
    "SmallColour": _small_colour,
}


def _layers(network: torch.nn.Module) -> list[Any]:
    """Returns the initial weights of the layers with the inputs before the outputs."""
    layers = []
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            weight = module.weight.detach()
            weight = weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight.t()
            assert module.bias is not None
            layers.append((jnp.asarray(weight.numpy()), jnp.asarray(module.bias.detach().numpy())))
    return layers


def train(network: Any, tensors: tuple[torch.Tensor, ...], warm_up: int, steps: int) -> float:
    """Returns the seconds of a median step, with torch's DataLoader, after ``warm_up`` steps."""
    forward = NETWORKS[network.__name__]
    optimizer = optax.adam(1e-3)
    layers = _layers(network())
    state = optimizer.init(layers)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(layers: Any, state: Any, images: Any, labels: Any, key: Any) -> Any:
        def loss_of(layers: Any) -> jax.Array:
            logits = forward(layers, images, key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(layers)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(layers, updates), state, loss

    images, labels = tensors
    loader = DataLoader(TensorDataset(images.permute(0, 2, 3, 1).contiguous(), labels), network.batch, shuffle=True)
    key, ends = jax.random.key(0), []
    while len(ends) < warm_up + steps:
        for inputs, targets in loader:
            key, own = jax.random.split(key)
            numbers = inputs.numpy(), targets.numpy().astype(np.int32)
            layers, state, loss = step(layers, state, *numbers, own)
            loss.block_until_ready()
            ends.append(time.perf_counter())
    ends = ends[warm_up : warm_up + steps]
    return median([after - before for before, after in pairwise(ends)])
