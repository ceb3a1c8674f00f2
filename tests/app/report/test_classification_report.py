"""The report of a classification: mistakes in colour, and confusion matrices of few and of many classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightkit.app.report.classification import confusion_matrix, sections, worst_mistakes
from lightkit.app.report.figures import save
from lightkit.data import ImageFolder, ImageSet


def logits_for(predicted, count):
    return torch.nn.functional.one_hot(predicted, count).float() * 3


@pytest.mark.parametrize(("channels", "as_ink", "expected"), [(3, False, (250, 10, 20)), (1, False, 250), (1, True, 5)])
def test_mistakes_show_the_image(channels, as_ink, expected):
    """A wrongly predicted image has its colours; grey is shown as it is, or as ink on paper."""
    colour = torch.tensor([250, 10, 20], dtype=torch.uint8)
    images = colour.view(1, 3, 1, 1).expand(2, 3, 20, 26) if channels == 3 else torch.full((2, 20, 26), 250).byte()
    figure = worst_mistakes(
        images, logits_for(torch.tensor([1, 0]), 2), torch.tensor([0, 0]), ["a", "b"], as_ink=as_ink
    )
    (shown,) = figure.axes[0].images
    (pixel,) = np.unique((shown.to_rgba(shown.get_array(), bytes=True)).reshape(-1, 4)[:, :3], axis=0)
    assert np.abs(pixel.astype(int) - expected).max() <= 1
    # The picture keeps its shape.
    left, right, bottom, top = shown.get_extent()
    assert abs((bottom - top) / (right - left)) == pytest.approx(20 / 26)


def test_many_classes_stay_readable(tmp_path):
    """With 100 classes the figure has no thousand numbers, a bounded size, and the names of some classes."""
    count = 100
    labels = torch.arange(3000) % count
    predicted = torch.where(torch.arange(3000) % 7 == 0, (labels + 1) % count, labels)
    figure = confusion_matrix(logits_for(predicted, count), labels, [f"class {i}" for i in range(count)])
    width, height = figure.get_size_inches()
    assert max(width, height) <= 16
    axis = figure.axes[0]
    assert len(axis.texts) == 0
    assert 10 <= len(axis.get_xticks()) <= 50 and len(axis.get_xticks()) == len(axis.get_yticks())
    save(figure, tmp_path / "matrix.png")
    small = confusion_matrix(logits_for(predicted % 10, 10), labels % 10, [str(i) for i in range(10)])
    assert len(small.axes[0].texts) >= 10


def test_most_confused_pairs_are_listed(tmp_path):
    """With many classes a table names the pairs that the model confuses most, with escaped names."""
    count = 60
    labels = torch.arange(600) % count
    predicted = labels.clone()
    predicted[labels == 3] = 4
    predicted[(labels == 7) & (torch.arange(600) < 300)] = 8
    data = ImageFolder("nowhere", image_size=20, channels=3, classes=[f"<{i}>" for i in range(count)])
    data.test = ImageSet(torch.zeros(600, 3, 20, 20, dtype=torch.uint8), labels)
    recorded = {"logits": logits_for(predicted, count), "labels": labels}
    made = {section.title: section for section in sections(tmp_path, data, recorded)}
    table = made["Most confused classes"].html
    assert table.index("&lt;3&gt;</td><td>&lt;4&gt;</td><td>10") < table.index("&lt;7&gt;</td><td>&lt;8&gt;</td><td>5")
    assert "<3>" not in table
