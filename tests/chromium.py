"""Headless Chromium through its DevTools pipe: open a page, run script in it, click, look; no driver package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Page:
    """One page of a running browser; `log` holds its console and its exceptions, `asked` the URLs that it and its workers asked for."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.buffer, self.count = to, back, b"", 0
        self.log: list[str] = []
        self.asked: list[str] = []
        self.session, self.loaded = "", False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{name}.enable")
        # Workers are targets of their own: watch them too.
        self.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def send(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """A DevTools command and its result."""
        self.count += 1
        number = self.count
        message = {"id": number, "method": method, "params": params}
        if session or self.session:
            message["sessionId"] = session or self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, timeout: float = 60) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.back], [], [], timeout)[0]:
                raise TimeoutError(f"chromium says nothing for {timeout} s")
            more = os.read(self.back, 2**20)
            if not more:
                raise RuntimeError("chromium ended")
            self.buffer += more
        text, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._watch(message)
        return message

    def _watch(self, message: dict[str, Any]) -> None:
        params, method = message.get("params", {}), message.get("method")
        if method == "Runtime.consoleAPICalled":
            self.log.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.log.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.log.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Target.attachedToTarget":
            for name in ("Runtime", "Network", "Log"):
                line = json.dumps({"id": -1, "method": f"{name}.enable", "params": {}, "sessionId": params["sessionId"]})
                os.write(self.to, line.encode() + b"\0")

    def open(self, url: str) -> None:
        """Go to a page and wait until it is there."""
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "exception in the page"))
        return result["result"].get("value")

    def wait(self, script: str, timeout: float = 60) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + timeout
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script} did not become true in {timeout} s; the page said {self.log}")
            time.sleep(0.05)
        return value

    def look(self, path: Path, width: int = 1200, height: int = 900, *, dark: bool = False, phone: bool = False) -> None:
        """A picture of the whole page."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def open_chromium(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile, ended in any case."""
    their_in, to = os.pipe()
    back, their_out = os.pipe()
    command = [
        "bash",
        "-c",
        f'exec "$@" 3<&{their_in} 4>&{their_out}',
        "bash",
        shutil.which("chromium") or "chromium",
    ]  # dash knows one digit
    command += [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        os.close(their_in)
        os.close(their_out)
        page = None
        try:
            page = Page(to, back)
            yield page
        finally:
            if page:
                page.session = ""
                with contextlib.suppress(OSError, RuntimeError, TimeoutError):
                    page.send("Browser.close")
            os.close(to)
            os.close(back)
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                browser.kill()
