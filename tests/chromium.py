"""Headless Chromium, driven over its DevTools protocol: for the test of the status page, and its
screenshot. No part of what is installed; who has none is told so."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "google-chrome-stable",
)
START_TIMEOUT_S = 60.0
WAIT_S = 60.0
"""For what a page is to show. On a busy machine a browser takes seconds for its first frame."""
MAX_MESSAGE_BYTES = 64 << 20


def find_chromium() -> str | None:
    """The program; None where none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page. What it asked for and what went wrong in it is kept from the first moment on."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session_id: str) -> None:
        self.requests: list[str] = []
        """URLs that it asked for."""
        self.problems: list[str] = []
        """Errors on its console, and exceptions."""
        self._socket = socket
        self._session_id = session_id
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol. Raises RuntimeError for what it refuses."""
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_json(
            {
                "id": number,
                "sessionId": self._session_id,
                "method": method,
                "params": parameters,
            }
        )
        try:
            async with asyncio.timeout(WAIT_S):
                return await answer
        finally:
            del self._answers[number]

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page. Raises RuntimeError for what it throws."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def wait_for(self, expression: str, timeout_s: float = WAIT_S) -> Any:
        """Wait until the expression is true in the page; returns its value."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {expression}\nThe page shows:\n{text}") from None
        return value

    async def show(self, *, width: int, height: int, dark: bool = False, scale: int = 1) -> None:
        """Be a screen of that size, in light or dark colours."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self) -> bytes:
        """The whole page, as a PNG."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def hear(self, message: dict[str, Any]) -> None:
        """Take in one message of the browser's about this page."""
        if (answer := self._answers.get(message.get("id", 0))) is not None:
            if answer.done():
                return
            if "error" in message:
                answer.set_exception(RuntimeError(str(message["error"])))
            else:
                answer.set_result(message["result"])
            return
        parameters = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.problems.append(str(parameters["entry"]))


@contextlib.asynccontextmanager
async def open_tab(program: str, url: str) -> AsyncIterator[Tab]:
    """A browser of its own that shows `url`, until the end of the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = _start(program, Path(folder))
        try:
            address = await _address(process, Path(folder) / "DevToolsActivePort")
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(address, max_msg_size=MAX_MESSAGE_BYTES) as socket,
            ):
                tab = await _attach(socket)
                hearing = asyncio.create_task(_hear(socket, tab))
                try:
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await tab.call(f"{domain}.enable")
                    await tab.call("Page.navigate", url=url)
                    await tab.wait_for(
                        "document.readyState === 'complete' && location.href !== 'about:blank'"
                    )
                    yield tab
                finally:
                    hearing.cancel()
                    await asyncio.gather(hearing, return_exceptions=True)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # a script may have started it
            await asyncio.to_thread(process.wait)


def _start(program: str, folder: Path) -> subprocess.Popen[bytes]:
    flags = [
        "--headless=new",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        # It asks nobody but this machine.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    ]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # which does not work for root
    return subprocess.Popen(
        [program, *flags, "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


async def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    """Where the browser listens, once it does."""

    def read() -> list[str]:
        return file.read_text().split() if file.exists() else []

    async with asyncio.timeout(START_TIMEOUT_S):
        while len(lines := await asyncio.to_thread(read)) < 2:
            assert process.poll() is None, "the browser ended"
            await asyncio.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


async def _attach(socket: aiohttp.ClientWebSocketResponse) -> Tab:
    async def ask(method: str, **parameters: Any) -> Any:
        await socket.send_json({"id": 1, "method": method, "params": parameters})
        async with asyncio.timeout(WAIT_S):
            while (message := await socket.receive_json()).get("id") != 1:
                pass
        return message["result"]

    target = await ask("Target.createTarget", url="about:blank")
    session = await ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
    return Tab(socket, session["sessionId"])


async def _hear(socket: aiohttp.ClientWebSocketResponse, tab: Tab) -> None:
    async for message in socket:
        tab.hear(message.json())
