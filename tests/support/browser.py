"""A page in a headless Chromium, driven by the browser's debugging protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Seconds for an answer of the browser.
_TIMEOUT = 60.0


class Page:
    """A page of a browser.

    Args:
        process: the browser, which reads commands from descriptor 3 and answers on descriptor 4.
        commands: the descriptor of the commands.
        answers: the descriptor of the answers.

    Attributes:
        errors: what the page reported: exceptions, and errors and warnings on the console.
        requests: the addresses that the page loaded or tried to load, its own included, without those of embedded data.
    """

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._process = process
        self._commands, self._answers = commands, answers
        self._pending = b""
        self._number = 0
        self._loaded = False
        self._session: str | None = None
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """Opens a file in a window of ``width`` pixels and waits until it is loaded."""
        self.errors.clear()
        self.requests.clear()
        self._send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._send("Page.navigate", url=path.absolute().as_uri())
        end = time.monotonic() + _TIMEOUT
        while not self._loaded:
            self._receive(end)
        # Observers of sizes are called with the next frame.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """Returns the value of a script, or that of the promise that it returns."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, button: str = "none", clicks: int = 0) -> None:
        """Moves (``mouseMoved``), presses (``mousePressed``) or releases (``mouseReleased``) the mouse at a place."""
        down = int(kind == "mousePressed" or (kind == "mouseMoved" and button == "left"))
        event = {"type": kind, "x": x, "y": y, "button": button, "buttons": down, "clickCount": clicks}
        self._send("Input.dispatchMouseEvent", **event)

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the whole page."""
        size = self._send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self._send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _TIMEOUT
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, end: float) -> dict[str, Any]:
        """Returns the next message of the browser, after it has taken note of an event."""
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._answers, 1 << 20)
            assert more, f"the browser ended with status {self._process.poll()}"
            self._pending += more
        text, _, self._pending = self._pending.partition(b"\0")
        message = json.loads(text)
        event, content = message.get("method"), message.get("params", {})
        if event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(content["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(content["args"]))
        elif event == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.errors.append(content["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            if not content["request"]["url"].startswith("data:"):
                self.requests.append(content["request"]["url"])
        elif event == "Page.loadEventFired":
            self._loaded = True
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Yields a page in a headless Chromium, which ends with the context.

    Args:
        profile: an empty directory for the files of the browser.
    """
    assert CHROMIUM is not None, "look at CHROMIUM first"
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()

    def connect() -> None:
        # Descriptors 3 and 4 may be those of the pipes themselves.
        read, write = os.dup(command_read), os.dup(answer_write)
        os.dup2(read, 3)
        os.dup2(write, 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    options += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking"]
    process = subprocess.Popen(
        [CHROMIUM, *options],
        close_fds=False,
        preexec_fn=connect,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Page(process, command_write, answer_read)
    finally:
        # The browser's own processes are of its session.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(command_write)
        os.close(answer_read)
