"""Registered ops called as no function of lightkit calls them: each raises one error that names the argument."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from lightkit import native

pytestmark = pytest.mark.sanitized

HUGE = 1 << 40


@pytest.fixture(autouse=True)
def registered() -> None:
    native.load()


def op(name: str) -> Any:
    return getattr(torch.ops.lightkit, name).default


def short(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose storage was resized to half of what its elements take."""
    tensor = torch.zeros(sizes, dtype=dtype)
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def called(name: str, values: dict[str, Any], **changes: Any) -> Any:
    """Calls an op with right arguments by name, some of them changed."""
    schema = op(name)._schema
    return op(name)(*[{**values, **changes}[argument.name] for argument in schema.arguments])


LOSS = {
    "reduction": 1,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": 0.0,
    "dtype": None,
    "weight": None,
}


def cross_entropy_values() -> dict[str, Any]:
    flags = {"return_lse": False, "inplace": False, "with_gradient": True, "with_lse": True}
    return {**LOSS, **flags, "logits": torch.randn(4, 5), "target": torch.zeros(4, dtype=torch.int64)}


def linear_values() -> dict[str, Any]:
    return {
        **LOSS,
        "hidden": torch.randn(4, 3),
        "linear_weight": torch.randn(5, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "linear_bias": None,
        "memory_limit": 1 << 20,
        "hidden_wanted": True,
        "weight_wanted": True,
        "bias_wanted": False,
        "grad_loss": torch.ones(()),
        "row_statistics": torch.zeros(3, 4),
    }


def chain_values() -> dict[str, Any]:
    input, weights, biases = torch.randn(2, 3, 6, 6), [torch.randn(4, 3, 3, 3), torch.randn(2, 16)], [None, None]
    settings = [0, 0, 1, 1, 0, 0, 0, 0]
    output, activations, argmax = op("_layer_chain_forward")(input, weights, biases, settings, True)
    return {
        "input": input,
        "weights": weights,
        "biases": biases,
        "settings": settings,
        "keep": True,
        "scales": [0.1, 0.0],
        "grad_output": torch.ones_like(output),
        "activations": activations,
        "argmax": argmax,
        "wanted": [1] * 5,
    }


CROSS_ENTROPY = ["cross_entropy", "_cross_entropy_forward", "_cross_entropy_forward_"]


@pytest.mark.parametrize("name", CROSS_ENTROPY)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": torch.int64}, ValueError, "dtype of the loss must be floating point, got Long"),
        ({"reduction": 3}, ValueError, "reduction must be 0"),
        ({"reduction": -1}, ValueError, "reduction must be 0"),
        ({"softcap": float("nan")}, ValueError, "softcap must not be negative"),
        ({"label_smoothing": float("nan")}, RuntimeError, "label_smoothing must be between"),
        ({"logits": short(4, 5)}, ValueError, "the logits of shape .4, 5. reaches beyond its storage of 40 bytes"),
        ({"target": short(4, dtype=torch.int64)}, ValueError, "the target of shape .4. reaches beyond its storage"),
        ({"weight": short(5)}, ValueError, "weight of shape .5. reaches beyond its storage"),
        (
            {"logits": torch.empty(HUGE, 0, HUGE), "target": torch.zeros((), dtype=torch.int64)},
            ValueError,
            "the target must have shape",
        ),
        (
            {"logits": torch.empty(HUGE, 0, HUGE), "target": torch.empty(HUGE, 0, HUGE)},
            ValueError,
            "fewer than 2.63 elements",
        ),
    ],
)
def test_cross_entropy(name, changes, error, message) -> None:
    """Types, values, storages that are too short, and sizes whose product is beyond any number."""
    with pytest.raises(error, match=message):
        called(name, cross_entropy_values(), **changes)


def test_negative_bits_in_place() -> None:
    """Logits that are written into and whose sign is still to be changed: torch failed an assertion of its own."""
    values = cross_entropy_values()
    with pytest.raises(ValueError, match="without negative bit"):
        called("_cross_entropy_forward_", values, logits=torch._neg_view(values["logits"]))
    weight, logits = torch.rand(5), values["logits"].clone()
    expected = called("_cross_entropy_forward_", values, logits=values["logits"].clone(), weight=-weight)
    found = called("_cross_entropy_forward_", values, logits=logits, weight=torch._neg_view(weight))
    torch.testing.assert_close(found, expected)


def test_cross_entropy_without_classes_takes_no_memory_for_rows() -> None:
    """A loss that is reduced wants nothing for each of 2^50 rows that have no classes."""
    logits = torch.empty(1 << 50, 0)
    loss, _ = op("cross_entropy")(logits, logits, None, 2)
    assert loss == 0


@pytest.mark.parametrize("name", ["_linear_cross_entropy_forward", "_linear_cross_entropy_backward"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bias_wanted": True}, ValueError, "bias_wanted must be False where linear_bias is None, got True"),
        ({"linear_weight": torch.randn(0, 3)}, ValueError, "a linear_weight that is not empty"),
        ({"dtype": torch.complex64}, ValueError, "dtype of the loss must be floating point"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be positive"),
        ({"memory_limit": -(2**63)}, ValueError, "memory_limit must be positive"),
        ({"hidden": short(4, 3)}, ValueError, "the input of shape .4, 3. reaches beyond its storage"),
        ({"linear_weight": short(5, 3)}, ValueError, "linear_weight of shape .5, 3. reaches beyond its storage"),
        ({"linear_weight": torch.randn(5, 3, device="meta")}, RuntimeError, "linear_weight is on meta"),
    ],
)
def test_linear_cross_entropy(name, changes, error, message) -> None:
    """A bias that is None and wants a gradient read a null pointer."""
    with pytest.raises(error, match=message):
        called(name, linear_values(), **changes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_loss": torch.ones(4)}, "grad_loss must be floating point and have the shape of the loss"),
        ({"grad_loss": torch.ones((), dtype=torch.int64)}, "grad_loss must be floating point"),
        ({"row_statistics": torch.zeros(3, 5)}, "row_statistics must be what the forward pass returned"),
        (
            {"row_statistics": torch.zeros(3, 4, dtype=torch.float64)},
            "row_statistics must be what the forward pass returned",
        ),
        ({"bias_wanted": True}, "bias_wanted must be False"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, "the target must have shape"),
    ],
)
def test_linear_cross_entropy_backward(changes, message, device) -> None:
    """What backward gets is compared with what forward returned, on the meta device as on others."""
    values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**linear_values(), **changes}.items()}
    with pytest.raises(ValueError, match=message):
        called("_linear_cross_entropy_backward", values)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_linear_cross_entropy_backward_without_rows(dtype, reduction) -> None:
    """The op itself divided by a stride of 0."""
    values = linear_values()
    changes = {"hidden": torch.randn(0, 3, dtype=dtype), "linear_weight": torch.randn(5, 3, dtype=dtype)}
    changes |= {"target": torch.zeros(0, dtype=torch.int64), "reduction": reduction}
    changes["row_statistics"] = torch.zeros(3, 0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    changes["grad_loss"] = torch.ones(0 if reduction == 0 else (), dtype=dtype)
    of_hidden, of_weight, _ = called("_linear_cross_entropy_backward", values, **changes)
    assert of_hidden.shape == (0, 3) and not of_weight.any()


@pytest.mark.parametrize("name", ["layer_chain", "_layer_chain_forward", "_layer_chain_backward"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"settings": [0, 0, 1, 2, 0, 0, 0, 0]}, ValueError, r"layer 0: relu and pool must be 0 or 1, got \[1, 2\]"),
        ({"settings": [0, 0, -1, 1, 0, 0, 0, 0]}, ValueError, "layer 0: relu and pool must be 0 or 1"),
        ({"settings": [0, 0, 1, 1]}, ValueError, "four numbers of settings"),
        ({"settings": [2**62, 0, 1, 1, 0, 0, 0, 0]}, ValueError, "padding must be two numbers from 0"),
        ({"settings": [2**29, 2**29, 1, 1, 0, 0, 0, 0]}, ValueError, "images of less than 2.30 values"),
        ({"weights": []}, ValueError, "each layer must have a weight"),
        (
            {"input": torch.empty(0).as_strided([0, HUGE, HUGE, HUGE], [1, 0, 0, 0])},
            ValueError,
            "images of less than 2.30 values",
        ),
        ({"input": short(2, 3, 6, 6)}, ValueError, "the input of shape .2, 3, 6, 6. reaches beyond its storage"),
        ({"weights": [short(4, 3, 3, 3), torch.randn(2, 16)]}, ValueError, "a weight .* reaches beyond its storage"),
        ({"weights": [torch.randn(4, 3, 3, 3), torch.randn(2, 16, device="meta")]}, RuntimeError, "on meta"),
    ],
)
def test_layer_chain(name, changes, error, message) -> None:
    """Flags that are none, sizes beyond any image, storages and devices."""
    with pytest.raises(error, match=message):
        called(name, chain_values(), **changes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_output": torch.ones(2, 3)}, "the gradient must have the shape of the output"),
        ({"grad_output": torch.ones(2, 2, dtype=torch.float64)}, "the gradient must be of the dtype"),
        ({"activations": torch.ones(3)}, "be what forward returned, 32 values of Float .* got .*, .3. of Float and"),
        ({"argmax": torch.ones(3, dtype=torch.uint8)}, "and 36 of Byte, got .* .3. of Byte"),
        ({"argmax": torch.ones(36)}, "and 36 of Byte, got .* .36. of Float"),
        ({"wanted": [1, 1]}, "`wanted` must have a flag for the input and two for each layer, got 2"),
        ({"wanted": [1, 1, 1, 1, -5]}, "`wanted` must be 0 or 1"),
    ],
)
def test_layer_chain_backward(changes, message, device) -> None:
    """What forward kept must belong to the rest; on the meta device nothing was checked."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    with pytest.raises((ValueError, RuntimeError), match=message):
        called("_layer_chain_backward", {k: moved(v) for k, v in {**chain_values(), **changes}.items()})


def test_layer_chain_backward_on_mixed_devices() -> None:
    """A tensor on the meta device among others is no reason to return gradients without values."""
    with pytest.raises(RuntimeError, match="gradient must be of the dtype and on the device of the input"):
        called("_layer_chain_backward", chain_values(), grad_output=torch.ones(2, 2, device="meta"))


@pytest.mark.parametrize("pool", [False, True])
def test_layer_chain_backward_of_any_index(pool) -> None:
    """Whatever bytes are in the argmax, gradients are read and written within their memory."""
    generator = torch.Generator().manual_seed(0)
    for channels, out_channels in [(1, 3), (3, 16), (16, 33)]:
        input, weights = torch.randn(2, channels, 6, 6), [torch.randn(out_channels, channels, 3, 3)]
        settings = [1, 1, 1, int(pool)]
        output, activations, argmax = op("_layer_chain_forward")(input, weights, [None], settings, True)
        for wrong in (torch.full_like(argmax, 255), torch.randint(0, 256, argmax.shape, generator=generator).byte()):
            arguments = (torch.ones_like(output), input, weights, activations, wrong, settings, [1, 1, 1])
            assert op("_layer_chain_backward")(*arguments)[0].shape == input.shape


@pytest.mark.parametrize("padding", [[], [1], [1, 1, 1]])
def test_conv_relu_pool_padding(padding) -> None:
    """A list that is too short was read beyond its end."""
    with pytest.raises(ValueError, match="padding must be two numbers from 0 up"):
        op("conv_relu_pool")(torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3), None, padding, True)


def test_apply_upstream() -> None:
    """Shapes that do not go together, dtypes that do not, and storages that are too short."""
    gradient = torch.ones(4, 5)
    for upstream in (torch.ones(3), torch.ones(4, 5, 6), torch.ones((), dtype=torch.complex64)):
        with pytest.raises(RuntimeError):
            op("_apply_upstream_")(gradient, upstream)
    with pytest.raises(ValueError, match=r"the gradient of shape \[4, 5\] reaches beyond its storage"):
        op("_apply_upstream_")(short(4, 5), torch.ones(()))
    assert torch.equal(gradient, torch.ones(4, 5))


class TestPlans:
    """The native side of the optimizers, with groups and state that are none."""

    OPTIONS: ClassVar = {
        "AdamPlan": {
            **{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
            **{"decoupled_weight_decay": False, "amsgrad": False, "maximize": False},
        },
        "SgdPlan": {
            **{"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0},
            **{"nesterov": False, "maximize": False},
        },
    }

    @pytest.fixture(params=["AdamPlan", "SgdPlan"])
    def name(self, request) -> str:
        return request.param

    def step(self, name: str, groups: Any, state: Any, scale: Any = None) -> Any:
        return getattr(native.load(), name)().step(groups, state, None, False, 1.0, scale, None)

    def parameter(self) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        return parameter

    @pytest.mark.parametrize("missing", ["params", "lr", "weight_decay", "maximize"])
    def test_missing_option(self, name, missing) -> None:
        """A group without an option."""
        group = {"params": [self.parameter()], **self.OPTIONS[name]}
        del group[missing]
        with pytest.raises(KeyError, match=f"a parameter group has no '{missing}'"):
            self.step(name, [group], {})

    @pytest.mark.parametrize("wrong", [{"lr": "1"}, {"params": 3}, {"params": [1]}, {"params": [[]]}])
    def test_wrong_option(self, name, wrong) -> None:
        """An option, or a parameter, of another class."""
        with pytest.raises(TypeError):
            self.step(name, [{"params": [self.parameter()], **self.OPTIONS[name], **wrong}], {})

    @pytest.mark.parametrize(
        ("mask", "expected"),
        [
            (torch.ones(2, dtype=torch.bool), r"shape \[3\] has a mask of shape \[2\]"),
            (torch.ones(3), "has a mask of shape .* and dtype Float"),
            (torch.ones(3, dtype=torch.bool).to_sparse(), "mask"),
            (None, "expected a tensor"),
        ],
    )
    def test_wrong_mask(self, name, mask, expected) -> None:
        """A mask of another shape, dtype, layout or class changes nothing."""
        parameter = self.parameter()
        groups = [{"params": [parameter], **self.OPTIONS[name]}]
        plan = getattr(native.load(), name)()
        with pytest.raises((RuntimeError, TypeError), match=expected):
            plan.step(groups, {}, None, False, 1.0, None, None, {parameter: mask})
        with pytest.raises(TypeError, match="masks must be None or a dict"):
            plan.step(groups, {}, None, False, 1.0, None, None, [mask])
        assert torch.equal(parameter, torch.ones(3))

    def test_flags_that_cannot_be_read(self, name) -> None:
        """An exception of a flag's __bool__ was lost, and came up in a later call."""

        class Undecided:
            def __bool__(self) -> bool:
                raise ZeroDivisionError("undecided")

        with pytest.raises(ZeroDivisionError):
            group = {"params": [self.parameter()], **self.OPTIONS[name], "maximize": Undecided()}
            self.step(name, [group], {})

    def test_seeds_that_are_no_numbers(self, name) -> None:
        """An exception of the seed was lost likewise."""
        group = {"params": [self.parameter()], **self.OPTIONS[name], "stochastic_rounding": True, "rounding_seed": "1"}
        with pytest.raises(TypeError):
            self.step(name, [group], {})

    @pytest.mark.parametrize("entry", [None, 1, []])
    def test_state_of_another_class(self, name, entry) -> None:
        """The state of a parameter that is no dict."""
        parameter = self.parameter()
        with pytest.raises(TypeError, match="the state of a parameter must be a dict, got"):
            self.step(name, [{"params": [parameter], **self.OPTIONS[name]}], {parameter: entry})

    def test_group_of_another_class(self, name) -> None:
        """A group that is no dict."""
        with pytest.raises(TypeError, match="a parameter group must be a dict, got"):
            self.step(name, [1], {})

    def test_scale_on_a_cpu(self, name) -> None:
        """A scale that no kernel would read is refused, not left out."""
        with pytest.raises(TypeError, match="grad_scale and found_inf must be None or float32 tensors"):
            self.step(name, [{"params": [self.parameter()], **self.OPTIONS[name]}], {}, torch.ones(()))

    def test_storage_that_is_too_short(self, name) -> None:
        """A parameter, a gradient or a buffer beyond its storage."""
        group = {"params": [self.parameter()], **self.OPTIONS[name]}
        group["params"][0].grad = short(3)
        with pytest.raises(ValueError, match="reaches beyond its storage"):
            self.step(name, [group], {})

    @pytest.mark.parametrize("count", [float("nan"), -1.0, float("inf")])
    def test_count_that_is_none(self, count) -> None:
        """A count of steps that no integer stands for."""
        parameter = self.parameter()
        entry = {"step": torch.tensor(count), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
        group = {"params": [parameter], **self.OPTIONS["AdamPlan"]}
        with pytest.raises(ValueError, match="the count of a parameter's steps must be a number from 0 up"):
            self.step("AdamPlan", [group], {parameter: entry})
