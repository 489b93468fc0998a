"""A page in Debian's chromium, without a window and without a network: what it drew, and what its console says."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"
TIMEOUT = 300


def chromium() -> str | None:
    """Where the browser is, None where it is not installed."""
    return shutil.which("chromium")


class Mouse(str):
    """A JavaScript expression of what the mouse does: `[type, x, y]` each, a `MouseEvent` of DevTools."""


@dataclass(kw_only=True)
class Seen:
    """What became of a page at one width."""

    answers: list[Any] = field(default_factory=list)
    """What each script gave."""
    pictures: list[bytes] = field(default_factory=list)
    """All of the page after each script, as a PNG."""
    errors: list[str] = field(default_factory=list)
    """Of the console, and what was thrown."""
    requests: list[str] = field(default_factory=list)
    """Addresses that the page asked for, itself left out."""


def look(page: Path, widths: Sequence[int], scripts: Sequence[str], *, touch: bool = False) -> list[Seen]:
    """The page at each width, after the JavaScript expressions `scripts`, one after the other; they may be promises.

    Of one that is a `Mouse` the mouse does what it gives, on the part of the page that is seen.
    """
    # Its processes may outlive the one that is waited for, and still write there.
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as profile:
        command = [str(chromium()), *FLAGS, OFFLINE, f"--user-data-dir={profile}", "about:blank"]
        with open(Path(profile) / "stderr", "wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            return asyncio.run(asyncio.wait_for(_look(Path(profile), page, widths, scripts, touch=touch), TIMEOUT))
        finally:
            process.terminate()
            process.wait()


async def _look(profile: Path, page: Path, widths: Sequence[int], scripts: Sequence[str], *, touch: bool) -> list[Seen]:
    async with aiohttp.ClientSession() as session:
        port_file = profile / "DevToolsActivePort"
        while not port_file.exists() or "\n" not in port_file.read_text():
            await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{port_file.read_text().split()[0]}"
        seen = []
        for width in widths:
            async with session.put(f"{address}/json/new?about:blank") as answer:
                tab = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(tab, max_msg_size=0) as socket:
                seen.append(await _Tab(socket).show(page, width, scripts, touch=touch))
                await socket.send_str('{"id": 0, "method": "Page.close"}')
        return seen


class _Tab:
    """One tab, spoken to by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self._seen = socket, 0, Seen()

    async def show(self, page: Path, width: int, scripts: Sequence[str], *, touch: bool) -> Seen:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": touch}
        await self._call("Emulation.setDeviceMetricsOverride", **size)
        if touch:
            await self._call("Emulation.setTouchEmulationEnabled", enabled=True)
        gone = await self._call("Page.navigate", url=page.as_uri())
        assert "errorText" not in gone, gone
        while await self._value("location.protocol + document.readyState") != "file:complete":
            await asyncio.sleep(0.1)
        for script in scripts:
            answer = await self._value(script)
            self._seen.answers.append(answer)
            for kind, x, y in answer if isinstance(script, Mouse) else ():
                button = "none" if kind == "mouseMoved" else "left"
                await self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)
            shot = await self._call("Page.captureScreenshot", captureBeyondViewport=True)
            self._seen.pictures.append(base64.b64decode(shot["data"]))
        own = (page.as_uri(), "data:", "about:")
        self._seen.requests = [url for url in self._seen.requests if not url.startswith(own)]
        return self._seen

    async def _value(self, script: str) -> Any:
        told = await self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def _call(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": values}))
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self._seen.errors.append(json.dumps(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self._seen.errors.append(json.dumps(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self._seen.errors.append(json.dumps(values["entry"]))
        elif method == "Network.requestWillBeSent":
            self._seen.requests.append(values["request"]["url"])


if __name__ == "__main__":  # python tests/drivers/browser.py PAGE WIDTH PICTURE: to look at it
    DRAWN = "new Promise((done) => setTimeout(() => done(Bokeh.documents.length), 3000))"
    [found] = look(
        Path(sys.argv[1]).resolve(), [int(sys.argv[2])], [DRAWN, *sys.argv[4:]], touch=int(sys.argv[2]) < 600
    )
    Path(sys.argv[3]).write_bytes(found.pictures[-1])
    print(found.answers, found.errors, found.requests)
