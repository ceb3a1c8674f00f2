"""Random changes of batches: each does what it says, and the draws follow from seed, rank, epoch and batch alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.pictures import write_classes

from lightkit.config import build
from lightkit.data import ImageFolder, MNIST5k
from lightkit.data.augment import Affine, ColorJitter, Compose, Crop, Erase, Flip, preset
from lightkit.data.batches import BatchNumber
from lightkit.errors import ConfigError, DataError

EVERY = [Flip(1, 1), Crop(3), Crop(3, "zeros"), Affine(20, (0.7, 1.3), 0.2, 15), ColorJitter(1, 1, 1), Erase(1.0)]


def noise(count=6, channels=3, height=12, width=17):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transform", [*EVERY, Compose(EVERY)], ids=lambda transform: type(transform).__name__)
@given(count=st.integers(0, 3), channels=st.sampled_from([1, 3, 4]), height=st.integers(1, 9), width=st.integers(1, 9))
def test_shape_and_range(transform, count, channels, height, width):
    """Any batch keeps its shape, its type and the range from 0 to 1, down to single pixels and no image."""
    images = torch.rand(count, channels, height, width)
    before = images.clone()
    changed = transform(images)
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert count == 0 or (-1e-5 <= changed.min() and changed.max() <= 1 + 1e-5)
    assert torch.equal(images, before)


def test_flip():
    """A probability of 1 mirrors, of 0 does not, and one half mirrors about half of the images."""
    images = noise(200)
    assert torch.equal(Flip(1, 0)(images), images.flip(3))
    assert torch.equal(Flip(0, 1)(images), images.flip(2))
    assert torch.equal(Flip(0, 0)(images), images)
    torch.manual_seed(0)
    changed = Flip()(images)
    mirrored = (changed == images.flip(3)).all(dim=(1, 2, 3))
    assert 70 < int(mirrored.sum()) < 130
    assert torch.equal(changed[~mirrored], images[~mirrored])


@pytest.mark.parametrize("fill", ["reflect", "zeros"])
def test_crop_is_padding_and_a_crop(fill):
    """Each result is a window of the padded image, and all offsets appear."""
    images = noise(300, 1, 6, 6)
    torch.manual_seed(0)
    changed = Crop(2, fill)(images)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect" if fill == "reflect" else "constant")
    windows = padded.unfold(2, 6, 1).unfold(3, 6, 1)[:, 0].reshape(300, 25, 6, 6)
    same = (windows == changed).all(dim=(2, 3))
    assert same.any(dim=1).all() and same.any(dim=0).all()


def test_affine_that_changes_nothing():
    """Without any range the image stays, not square either."""
    torch.testing.assert_close(Affine(0, (1, 1), 0, 0)(noise()), noise(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        # Half of the largest angle to either side turns the bar by 90 degrees, also where the image is not square.
        ([1.0, 0.5, 0.5, 0.5, 0.5], "upright"),
        ([0.5, 0.5, 0.5, 0.5, 0.5], "lying"),
    ],
)
def test_a_rotation_keeps_shapes(monkeypatch, drawn, expected):
    """A bar of 20 x 4 pixels that is turned by 90 degrees is one of 4 x 20, in an image of 24 x 40."""
    images = torch.zeros(1, 1, 24, 40)
    images[0, 0, 10:14, 10:30] = 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor(drawn).view(5, 1))
    turned = Affine(90, (1, 1), 0, 0, "zeros")(images)[0, 0]
    upright = torch.zeros(24, 40)
    upright[2:22, 18:22] = 1
    torch.testing.assert_close(turned, upright if expected == "upright" else images[0, 0], rtol=0, atol=1e-4)


def test_affine_scales_and_moves(monkeypatch):
    """A factor above 1 enlarges; a shift is a share of the side."""
    images = torch.zeros(1, 1, 20, 20)
    images[0, 0, 5:15, 5:15] = 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5]).view(5, 1))
    assert Affine(0, (1, 2), 0, 0, "zeros")(images).sum() > 3 * images.sum()
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([0.5, 0.5, 0.5, 1.0, 0.5]).view(5, 1))
    torch.testing.assert_close(Affine(0, (1, 1), 0.25, 0, "zeros")(images), images.roll(-5, 3), rtol=0, atol=1e-4)


def test_colours():
    """Without saturation an image is grey; without contrast it is its mean; grey images stay grey."""
    images = noise() * 0.5 + 0.2
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.manual_seed(0)
    lightened = ColorJitter(0.3, 0, 0)(images) / images
    assert lightened.std(dim=(1, 2, 3)).max() < 1e-5 and lightened.mean(dim=(1, 2, 3)).std() > 0.05
    saturated = ColorJitter(0, 0, 1)(images)
    torch.testing.assert_close((saturated * weights).sum(1), (images * weights).sum(1), rtol=0, atol=0.05)
    contrasted = ColorJitter(0, 1, 0)(images)
    assert contrasted.std(dim=(1, 2, 3)).std() > 0.02
    grey = images[:, :1].expand(-1, 3, -1, -1)
    jittered = ColorJitter(1, 1, 1)(grey)
    torch.testing.assert_close(jittered[:, 0], jittered[:, 2])


def test_erase():
    """The rectangle has an area of the given range, and other pixels stay."""
    images = noise(100, 3, 40, 60) * 0.5 + 0.4
    torch.manual_seed(0)
    changed = Erase(1.0, (0.1, 0.2))(images)
    covered = (changed == 0).all(dim=1)
    assert torch.equal(
        changed[~covered.unsqueeze(1).expand_as(changed)], images[~covered.unsqueeze(1).expand_as(changed)]
    )
    share = covered.float().mean(dim=(1, 2))
    assert share.min() > 0.07 and share.max() < 0.23
    assert len({tuple(part.nonzero()[0].tolist()) for part in covered}) > 50
    assert torch.equal(Erase(0.0)(images), images)


def test_other_types():
    """Half precision and float64 keep their type."""
    for dtype in (torch.bfloat16, torch.float64):
        assert Compose([Flip(), Crop(), Affine(), ColorJitter(), Erase()])(noise().to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        *((Flip, {"horizontal": 2}), (Crop, {"padding": -1}), (Crop, {"fill": "x"}), (Affine, {"scale": [2, 1]})),
        *((Affine, {"fill": "x"}), (Affine, {"shear": 90}), (ColorJitter, {"contrast": -1}), (Erase, {"area": [0, 1]})),
    ],
)
def test_wrong_arguments(cls, arguments):
    """The error names the argument."""
    with pytest.raises(DataError, match=next(iter(arguments))):
        cls(**arguments)


def batches(data, epochs=1, state=None):
    loader = data.train_dataloader()
    if state is not None:
        loader.load_state_dict(state)
    return [data.on_after_batch_transfer(batch, 0)[0] for _ in range(epochs) for batch in loader]


def test_draws_follow_from_the_numbers():
    """The same seed gives the same images whatever else was drawn; another seed, epoch, batch or rank others."""
    seeds = {
        BatchNumber(*numbers).seed(seed) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)) for seed in (0, 1)
    }
    assert len(seeds) == 8
    data = MNIST5k(batch_size=1000, transform="strong", seed=3)
    data.setup()
    first = batches(data, epochs=2)
    torch.rand(5)
    state = torch.get_rng_state()
    again = batches(data, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    resumed = batches(data, state={"epoch": 1, "batch": 2, "batch_size": 1000, "world_size": 1})
    assert all(torch.equal(a, b) for a, b in zip(resumed, first[6:], strict=True))


def test_only_the_training_changes(tmp_path):
    """Validation and test batches are the images themselves; training batches are not, in both layouts."""
    write_classes(tmp_path, {"cat": 12, "dog": 12})
    for layout in ("image", "rows"):
        plain, changed = (ImageFolder(str(tmp_path), layout=layout, transform=t) for t in (None, Erase(1.0)))
        for data in (plain, changed):
            data.setup()
        for name in ("val_dataloader", "test_dataloader"):
            (one,), (other,) = (
                [data.on_after_batch_transfer(batch, 0)[0] for batch in getattr(data, name)()]
                for data in (plain, changed)
            )
            assert torch.equal(one, other)
        (one,), (other,) = batches(plain), batches(changed)
        assert one.shape == other.shape and 0.01 < float((one != other).float().mean()) < 0.25
        assert len(next(iter(plain.train_dataloader()))) == 2


class Inverted(torch.nn.Module):
    """A transform of a user."""

    def forward(self, images):
        """Returns the inverted images."""
        return 1 - images


def test_transforms_of_a_configuration(monkeypatch, tmp_path):
    """A word, a class, a list of both, and a class of the user's package."""
    monkeypatch.setenv("LIGHTKIT_TARGETS", __name__)
    flip = {"_target_": "lightkit.data.augment.Flip", "horizontal": 1.0}
    own = {"_target_": f"{__name__}.Inverted"}
    for transform, expected in ((flip, 1), ([flip, own], 2), ("light", 1), (["strong", own], 2), (None, 0)):
        data = build({"_target_": "lightkit.data.MNIST5k", "transform": transform})
        assert len(data.transform.transforms) == expected
    with pytest.raises(ConfigError, match="transform must be one of light, strong, or transforms, got 'lihgt'"):
        build({"_target_": "lightkit.data.MNIST5k", "transform": "lihgt"})
    with pytest.raises(ConfigError, match="transform must be light, strong or callables of images, got 3"):
        build({"_target_": "lightkit.data.MNIST5k", "transform": [3]})


def test_a_transform_that_returns_something_else():
    """One line has the shape that a transform must return."""
    data = MNIST5k(transform=lambda images: images[:, :, ::2])
    data.setup()
    with pytest.raises(
        DataError, match=r"^transform must return images of shape \(32, 1, 28, 28\), got \(32, 1, 14, 28\)$"
    ):
        batches(data)


def test_digits_are_not_mirrored():
    """A mirrored digit is none: the words for grey images do not flip."""
    for name in ("light", "strong"):
        assert not any(isinstance(transform, Flip) for transform in preset(name, 1).transforms)
        assert any(isinstance(transform, Flip) for transform in preset(name, 3).transforms)
