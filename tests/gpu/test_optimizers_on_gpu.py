"""The optimizers' kernels on a GPU against float64 and torch's, under a GradScaler and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightkit.optim import SGD, Adam, AdamW

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# At the edge of a pack, a block of threads and a chunk; and more tensors than one launch takes.
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 4099, 70_001, 3_000_000, *[5] * 100]
CASES = [
    pytest.param(SGD, torch.optim.SGD, options, id=f"SGD {options}")
    for options in (
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    )
] + [
    pytest.param(own, torchs, options, id=f"{own.__name__} {options}")
    for own, torchs in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW))
    for options in ({}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True, "eps": 1e-3, "betas": (0.5, 0.9)})
]


def parameters(dtype: torch.dtype, sizes=SIZES, seed: int = 0, moved: bool = False) -> list[nn.Parameter]:
    """Normal numbers; ``moved``: not on 16-byte boundaries."""
    generator = torch.Generator("cuda").manual_seed(seed)
    start = 1 if moved else 0
    return [nn.Parameter(torch.randn(size + start, generator=generator).to(dtype)[start:].detach()) for size in sizes]


def set_gradients(targets: list[nn.Parameter], step: int, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Those of some step, of what they are in ``dtype``."""
    generator = torch.Generator("cuda").manual_seed(1000 + step)
    for parameter in targets:
        gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.grad = gradient.to(parameter.dtype) * scale


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for p in optimizer.param_groups[0]["params"] for n, t in optimizer.state[p].items() if n != "step"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", [False, True], ids=["aligned", "moved"])
@pytest.mark.parametrize(("own_class", "torch_class", "options"), CASES)
def test_steps_against_float64(own_class, torch_class, options, moved, dtype):
    """Every option moves parameters and states as in float64, but for one rounding a step."""
    ours = parameters(dtype, moved=moved)
    exact = [nn.Parameter(p.detach().double().clone()) for p in ours]
    optimizer = own_class(ours, lr=0.01, **options)
    reference = torch_class(exact, lr=0.01, foreach=False, **options)
    for step in range(3):
        set_gradients(ours, step, dtype)
        set_gradients(exact, step, dtype)
        optimizer.step()
        reference.step()
        assert optimizer._plan is not None
    eps = torch.finfo(dtype).eps
    for own, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=16 * eps, atol=32 * eps)
    for own, true in zip(states(optimizer), states(reference), strict=True):
        # A parameter that was rounded goes into the next gradient, by weight decay.
        torch.testing.assert_close(own.double(), true.double(), rtol=32 * eps, atol=32 * eps)


@pytest.mark.parametrize("make", [lambda p, **o: SGD(p, lr=0.1, momentum=0.9, **o), lambda p, **o: Adam(p, **o)])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(make, fused):
    """Scaled gradients move parameters as plain ones; a step that overflows changes nothing, the first one too."""
    scaled, plain = parameters(torch.float32, [5, 3000]), parameters(torch.float32, [5, 3000])
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    optimizer, reference = make(scaled, fused=fused or None), make(plain)
    scaler.scale(torch.ones(()))
    for step in range(4):
        overflows = step in (0, 2)
        set_gradients(scaled, step, torch.float32, scale=scaler.get_scale())
        if overflows:
            scaled[1].grad[7] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            set_gradients(plain, step, torch.float32)
            reference.step()
        for own, other in zip(scaled, plain, strict=True):
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: SGD(p, lr=lr, momentum=0.9, nesterov=True),
        lambda p, lr: Adam(p, lr=lr, capturable=True),
        lambda p, lr: AdamW(p, lr=lr, capturable=True, max_grad_norm=0.5, ema_decay=0.9),
    ],
    ids=["SGD", "Adam", "AdamW with extras"],
)
def test_graph_of_a_step(make):
    """A captured step counts and follows a learning rate on the GPU, as steps that are not captured."""
    captured, plain = parameters(torch.float32, [5, 3000]), parameters(torch.float32, [5, 3000])
    rate = torch.tensor(0.01)
    optimizer, reference = make(captured, rate), make(plain, torch.tensor(0.01))
    set_gradients(captured, 0, torch.float32)
    gradients = [p.grad for p in captured]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    set_gradients(plain, 0, torch.float32)
    reference.step()
    for step in range(1, 5):
        set_gradients(plain, step, torch.float32)
        for place, other in zip(gradients, plain, strict=True):
            place.copy_(other.grad)
        for group in (rate, reference.param_groups[0]["lr"]):
            group.mul_(0.7)
        graph.replay()
        reference.step()
    for own, other in zip(captured, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own_class", [SGD, Adam])
@pytest.mark.parametrize(
    "extras",
    [
        {"max_grad_norm": 0.5},
        {"skip_nonfinite": True},
        {"ema_decay": 0.9},
        {"master_weights": True},
        {"stochastic_rounding": True, "rounding_seed": 5},
        {"ema_decay": 0.9, "master_weights": True, "max_grad_norm": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extras_as_on_a_cpu(own_class, extras, dtype):
    """Every option gives what the kernels of a CPU give."""
    there = parameters(dtype, [5, 3000])
    here = [nn.Parameter(p.detach().cpu()) for p in there]
    on_gpu, on_cpu = own_class(there, lr=0.01, **extras), own_class(here, lr=0.01, **extras)
    for step in range(3):
        set_gradients(there, step, dtype)
        if "skip_nonfinite" in extras and step == 1:
            there[0].grad[2] = torch.nan
        for a, b in zip(there, here, strict=True):
            b.grad = a.grad.cpu()
        on_gpu.step()
        on_cpu.step()
        assert on_gpu.grad_norm == (None if on_cpu.grad_norm is None else pytest.approx(on_cpu.grad_norm, nan_ok=True))
    eps = 16 * torch.finfo(dtype).eps
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=eps, atol=eps)
        for name, value in on_cpu.state[b].items():
            torch.testing.assert_close(on_gpu.state[a][name].cpu(), value, rtol=eps, atol=eps)
    assert on_gpu.skipped_steps == on_cpu.skipped_steps


@pytest.mark.parametrize(
    ("own_class", "torch_class", "flags"),
    [
        (SGD, torch.optim.SGD, {"momentum": 0.9}),
        (Adam, torch.optim.Adam, {}),
        (Adam, torch.optim.Adam, {"capturable": True}),
        (Adam, torch.optim.Adam, {"fused": True}),
    ],
)
def test_state_goes_to_torch_and_back(own_class, torch_class, flags):
    """A run begun with one goes on with the other, wherever that keeps its counts."""
    results = []
    for first, second in ((own_class, torch_class), (torch_class, own_class), (torch_class, torch_class)):
        values = parameters(torch.float32, [5, 3000])
        state = None
        for turn, cls in enumerate((first, second)):
            optimizer = cls(values, lr=0.01, **flags)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(3):
                set_gradients(values, 3 * turn + step, torch.float32)
                optimizer.step()
            state = optimizer.state_dict()
        results.append(values)
    for own in results[:2]:
        for a, b in zip(own, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_two_devices_of_parameters():
    """Parameters on a CPU and on a GPU in one optimizer."""
    mixed = [nn.Parameter(torch.ones(5, device=device)) for device in ("cpu", "cuda")]
    optimizer = Adam(mixed, lr=0.1)
    for parameter in mixed:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    torch.testing.assert_close(mixed[0], mixed[1].cpu())


def test_a_count_on_the_host_is_not_captured():
    """A graph would repeat the count of its first step."""
    values = parameters(torch.float32, [5])
    optimizer = Adam(values)
    set_gradients(values, 0, torch.float32)
    optimizer.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"ema_decay": 0.9}, {"master_weights": True}], ids=str)
@pytest.mark.parametrize("own_class", [SGD, Adam])
def test_no_step_waits_for_the_gpu(own_class, options):
    """The host runs ahead, whatever is asked but skipping."""
    values = parameters(torch.bfloat16, [5, 3000])
    optimizer = own_class(values, lr=0.1, **options)
    set_gradients(values, 0, torch.bfloat16)
    optimizer.step()
    before = [p.detach().clone() for p in values]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        # Which is what a step that waits would run into.
        with pytest.raises(RuntimeError, match="synchronizing"):
            values[0].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not all(torch.equal(p, b) for p, b in zip(values, before, strict=True))
