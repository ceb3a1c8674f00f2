"""Report sections of a language model: bits per byte, generated texts, and the bits of each character of a passage."""

from __future__ import annotations

import codecs
import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightkit._util.numbers import format_number
from lightkit._util.printable import printable
from lightkit.app.report.figures import BLUE, GREY, grid, save, styled
from lightkit.app.report.section import Section, make_section
from lightkit.data.text import Text
from lightkit.tasks import LanguageModelTask

# The number of bytes of a prompt from the test set, of its continuation, and of the coloured passage.
_PROMPT_BYTES, _CONTINUATION_BYTES, _PASSAGE_BYTES = 80, 240, 1600
_SAMPLE_COUNT = 3
_TEMPERATURE = 0.8

# The text colour of a prompt, lighter than the black of the continuation.
_PROMPT_COLOR = "#64748b"

# A character of this many bits or more gets the strongest colour; a uniform model needs 8 bits for a byte.
_MAX_COLOR_BITS = 8
_PRE = '<pre style="white-space: pre-wrap; overflow-wrap: anywhere">'


def sections(
    run_dir: Path,
    metrics: dict[str, Any],
    task: LanguageModelTask,
    data: pl.LightningDataModule,
    recorded: dict[str, Tensor],
) -> list[Section]:
    """Returns the report sections about the test of a language model, and writes their figures into ``run_dir``.

    Without `lightkit.data.Text` as the data module, the sections with texts are left out.

    Args:
        run_dir: the directory for the figures.
        metrics: the final metrics by name.
        task: the trained task.
        data: the data module after `setup`.
        recorded: a dict with the key ``losses``: the losses ``(N, T)`` in nats of the T targets of the first N windows
            of the test set. For an empty dict the function returns an empty list.
    """
    if not recorded:
        return []
    bits = recorded["losses"] / math.log(2)

    def bars() -> Path | None:
        return save(bits_per_byte(metrics), run_dir / "bits_per_byte.png")

    def positions() -> Path | None:
        return save(by_position(bits), run_dir / "by_position.png")

    result = [*make_section("Bits a byte of the test", bars), *make_section("By place in the window", positions)]
    if isinstance(data, Text):
        assert data.test is not None, "call setup first"
        windows = data.test[: len(bits)]
        result += make_section("What it writes", lambda: samples(task, data, windows))
        result += make_section("What surprises it", lambda: passage(windows, bits))
        result += make_section("Where the bits go", lambda: costs(windows, bits))
    return result


@styled
def bits_per_byte(metrics: dict[str, Any]) -> Figure | None:
    """Draws the bits per byte of the model and of the baselines that count bytes.

    Args:
        metrics: the metrics by name, of which the function reads ``test/bits_per_byte`` and, for each baseline,
            ``baseline/<name>_bits_per_byte``.

    Returns:
        The figure; None if the metric of the model is missing or there is no baseline.
    """
    suffix = "_bits_per_byte"
    named = {name: value for name, value in metrics.items() if name.startswith("baseline/") and name.endswith(suffix)}
    if not named or "test/bits_per_byte" not in metrics:
        return None
    bars = {name[len("baseline/") : -len(suffix)]: value for name, value in named.items()}
    bars = dict(sorted(bars.items(), key=lambda item: -item[1])) | {"this model": metrics["test/bits_per_byte"]}
    # The loss of a training that diverged is not finite, and has no bar.
    lengths = [value if math.isfinite(value) else 0.0 for value in bars.values()]
    figure, axes = grid(7, 0.5 * len(bars) + 0.9, nrows=1, ncols=1)
    axis = axes[0, 0]
    axis.grid(False, axis="y")
    drawn = axis.barh(list(bars), lengths, color=[GREY] * (len(bars) - 1) + [BLUE], height=0.6)
    axis.bar_label(drawn, [format_number(value) for value in bars.values()], padding=4)
    axis.invert_yaxis()
    axis.set(xlabel="bits a byte (8: nothing known)", xlim=(0, (max(lengths) or 8.0) * 1.15))
    return figure


@styled
def by_position(bits: Tensor) -> Figure:
    """Draws the mean bits of a target over the number of tokens before it.

    Args:
        bits: ``(N, T)``, the bits of each target of each window.
    """
    figure, axes = grid(7, 3.2, nrows=1, ncols=1)
    axis = axes[0, 0]
    means = bits.mean(dim=0).numpy()
    axis.plot(range(1, len(means) + 1), means, color=BLUE, linewidth=1.8)
    axis.set(xlabel="tokens seen before", ylabel="bits", ylim=(0, None))
    return figure


def samples(task: LanguageModelTask, data: Text, windows: Tensor) -> str:
    """Returns HTML with continuations of passages of the test set, each after its prompt.

    Args:
        task: the trained task.
        data: the data module, which encodes and decodes text.
        windows: the tokens of N windows of the test set, uint8 ``(N, T + 1)``.
    """
    generator = torch.Generator(task.device).manual_seed(0)
    parts = []
    for sample in range(_SAMPLE_COUNT):
        window = windows[(2 * sample + 1) * len(windows) // (2 * _SAMPLE_COUNT)]
        prompt = window[:_PROMPT_BYTES].long()
        added = task.generate(prompt, _CONTINUATION_BYTES, temperature=_TEMPERATURE, generator=generator)
        given, made = (_escape(data.decode(part).decode(errors="replace")) for part in (prompt, added))
        parts.append(f'{_PRE}<span style="color: {_PROMPT_COLOR}">{given}</span>{made}</pre>')
    note = f"<p>Grey is from the test set, black is what the model adds, at temperature {_TEMPERATURE}.</p>"
    return note + "".join(parts)


def passage(windows: Tensor, bits: Tensor) -> str:
    """Returns HTML with a passage of the test set; the background of a character shows its bits.

    Args:
        windows: tokens ``(N, T + 1)`` of the test set.
        bits: ``(N, T)``, the bits of each target of each window.
    """
    count = min(len(windows), max(1, _PASSAGE_BYTES // bits.shape[1]))
    start = (len(windows) - count) // 2
    chosen = slice(start, start + count)
    tokens = windows[chosen, 1:].flatten().tolist()
    spans: list[str] = []
    for text, cost in _decode_characters(tokens, bits[chosen].flatten().tolist()):
        # Nine strengths suffice; neighbours of one strength share a span, which keeps the page small.
        strength = round(min(cost / _MAX_COLOR_BITS, 1.0) * 8) / 8
        style = f'<span style="background: rgba(234, 88, 12, {strength * 0.8:.2g})">'
        if spans and spans[-1].startswith(style):
            spans[-1] += _escape(text)
        else:
            spans.append(style + _escape(text))
    note = (
        f"<p>Windows {start + 1} to {start + count} of the test set. The stronger the colour, the more bits a "
        f"character takes: none at 0, the full one at {_MAX_COLOR_BITS} or more. Each window of {bits.shape[1]} bytes "
        "starts without memory.</p>"
    )
    return f"{note}{_PRE}{'</span>'.join(spans)}</span></pre>"


def costs(windows: Tensor, bits: Tensor, rows: int = 12) -> str:
    """Returns an HTML table of the bytes with the largest total of bits.

    Args:
        windows: tokens ``(N, T + 1)`` of the test set.
        bits: ``(N, T)``, the bits of each target of each window.
        rows: the largest number of bytes in the table.
    """
    targets = windows[:, 1:].flatten().long()
    total = torch.zeros(256, dtype=torch.float64).index_add_(0, targets, bits.flatten().double())
    count = targets.bincount(minlength=256)
    lines = []
    for byte in total.argsort(descending=True)[:rows].tolist():
        if count[byte]:
            name = html.escape(ascii(chr(byte))) if byte < 128 else f"0x{byte:02x}"
            lines.append(
                f"<tr><td>{name}</td><td>{total[byte] / count[byte]:.2f}</td>"
                f"<td>{count[byte] / len(targets):.1%}</td><td>{total[byte] / total.sum():.1%}</td></tr>"
            )
    head = "<tr><th>byte</th><th>bits each</th><th>share of the text</th><th>share of the bits</th></tr>"
    return f'<table class="classes">{head}{"".join(lines)}</table>'


def _escape(text: str) -> str:
    return html.escape(printable(text, keep="\n\t"))


def _decode_characters(tokens: list[int], bits: list[float]) -> Iterator[tuple[str, float]]:
    """Yields the characters of a text, each with the sum of the bits of its bytes.

    Args:
        tokens: the bytes of the text in UTF-8, as numbers from 0 to 255.
        bits: the bits of each byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    cost = 0.0
    for token, value in zip(tokens, bits, strict=True):
        cost += value
        if text := decoder.decode(bytes([token])):
            yield text, cost
            cost = 0.0
    if text := decoder.decode(b"", final=True):
        yield text, cost
