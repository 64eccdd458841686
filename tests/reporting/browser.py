"""A real Chromium without a window, over its DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

SECONDS = 120.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. What goes wrong in it is collected.

    Attributes:
        errors: what the console said as an error or a warning, exceptions that nobody caught, and the browser's log.
        requests: URLs that were asked for, without those that the page's own policy stopped.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []
        self._requests: dict[str, str] = {}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @property
    def requests(self) -> list[str]:
        return list(self._requests.values())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._heard(message)

    def _heard(self, message: dict[str, Any]) -> None:
        name, given = message.get("method"), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif name == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.errors.append(str(given["args"]))
        elif name == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.errors.append(given["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self._requests[given["requestId"]] = given["request"]["url"]
        elif name == "Network.loadingFailed" and given.get("blockedReason") == "csp":
            self._requests.pop(given["requestId"], None)

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = SECONDS) -> Any:
        """Wait until an expression is true. Gives its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"waited {seconds} s for {script}; errors: {self.errors}"
            time.sleep(0.02)
        return value

    def open(self, file: Path) -> float:
        """Open a report. Gives the seconds until its table stands there, as the page itself measures them."""
        url = file.absolute().as_uri()
        self._requests.clear()
        self.call("Page.navigate", url=url)
        ready = f"location.href === {json.dumps(url)} && document.documentElement?.dataset.ready"
        assert self.until(ready) == "yes", self.errors
        return float(self.run("Number(document.documentElement.dataset.seconds)"))

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )  # fmt: skip


@contextmanager
def browser_page(browser: str) -> Iterator[Page]:
    """A page in a browser of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="qcrd_ray-chromium-", ignore_cleanup_errors=True) as profile:
        command = [
            browser, "--headless=new", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses to be root's without it
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = _page_url(process, Path(profile))
            with connect(url, max_size=None, open_timeout=SECONDS, compression=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _page_url(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The address of the first tab's socket, once the browser is up."""
    file = profile / "DevToolsActivePort"
    end = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        assert time.monotonic() < end, f"the browser was not up after {SECONDS} s"
        with suppress(OSError):  # a busy machine takes its time
            if file.is_file() and (text := file.read_text().split()):
                with urllib.request.urlopen(f"http://127.0.0.1:{text[0]}/json/list", timeout=10) as answer:
                    tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
                if tabs:
                    return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
