"""A headless Chromium driven over pipes by the DevTools protocol: what the tests of the report's script need."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser that CHROME_BIN names, or one on PATH."""
    return shutil.which(os.environ.get("CHROME_BIN", "")) or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page of a browser."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer = to, back, b""
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        self.complaints: list[str] = []
        """Uncaught errors, and what was written to the console as an error or a warning."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, *, seconds: float = 60, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{what}: the browser does not answer"
            read = os.read(self._back, 1 << 20)
            assert read, f"{what}: the browser has gone"
            self._buffer += read
        raw, self._buffer = self._buffer.split(b"\0", 1)
        event = json.loads(raw)
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(params["entry"]))
        return event

    def size(self, width: int, height: int) -> None:
        """Of the window, as a phone's where it is narrow."""
        narrow = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=narrow)

    def open(self, page: Path) -> None:
        """Load a file and wait until it is whole."""
        answer = self.send("Page.navigate", url=page.resolve().as_uri())
        assert "errorText" not in answer, f"{page}: {answer}"
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)


@contextlib.contextmanager
def browser(binary: str, profile: Path) -> Iterator[Tab]:
    """A browser with an empty profile, which ends with the block."""
    (read, write), (answer_read, answer_write) = os.pipe(), os.pipe()

    def pipes() -> None:  # the browser reads commands from 3 and answers on 4
        commands, answers = os.dup(read), os.dup(answer_write)
        os.dup2(commands, 3)
        os.dup2(answers, 4)

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [binary, *flags, "about:blank"], preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL
    )
    os.close(read)
    os.close(answer_write)
    try:
        yield Tab(write, answer_read)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(write)
        os.close(answer_read)
