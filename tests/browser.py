"""A headless Chromium for the test of a page, driven by its DevTools protocol through a pipe, which
needs no package: open a page, click, press keys, read values and pixels, list what went wrong."""

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path

import numpy as np
from matplotlib.image import imread

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --remote-debugging-pipe"
).split()
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13}


def pipe() -> list[int]:
    """Both ends of a pipe, with numbers above the 3 and 4 that Chromium's ends get."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high


class Browser:
    def __init__(self, profile):
        its_input, self.commands = pipe()
        self.answers, its_output = pipe()
        null = os.open(os.devnull, os.O_WRONLY)
        self.pid = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 1),
                (os.POSIX_SPAWN_DUP2, null, 2),
                (os.POSIX_SPAWN_DUP2, its_input, 3),
                (os.POSIX_SPAWN_DUP2, its_output, 4),
            ],
            setpgroup=0,
        )
        for end in (its_input, its_output, null):
            os.close(end)
        self.received = b""
        self.events = []
        self.number = 0
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.commands, b'{"id": 0, "method": "Browser.close"}\0')
        end = time.time() + 10
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.time() > end:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.05)
        os.close(self.commands)
        os.close(self.answers)

    # ---- the protocol ----

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters} | self.session
        content = json.dumps(command).encode() + b"\0"
        while content:
            content = content[os.write(self.commands, content) :]
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def receive(self) -> dict:
        """The next message; an event is kept too."""
        while b"\0" not in self.received:
            assert select.select([self.answers], [], [], 60)[0], "Chromium does not answer"
            self.received += os.read(self.answers, 1 << 20)
        content, _, self.received = self.received.partition(b"\0")
        message = json.loads(content)
        if "method" in message:
            self.events.append(message)
        return message

    # ---- what a test does ----

    def open(self, path: Path, anchor="", width=1280, height=900, scheme="light") -> None:
        self.load("about:blank")  # else another anchor on the same page would load nothing
        self.events.clear()
        self.size(width, height)
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.load(path.as_uri() + anchor)

    def load(self, url: str) -> None:
        loader = self.call("Page.navigate", url=url)["loaderId"]
        while not any(is_loaded(event, loader) for event in self.events):
            self.receive()

    def size(self, width: int, height=900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, as JSON has it."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """(left, top, width, height) of an element, scrolled into the middle of the window."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center', inline: 'center'}})")
        box = "(({x, y, width, height}) => [x, y, width, height])"
        return tuple(self.evaluate(f"{box}({element}.getBoundingClientRect())"))

    def click(self, selector: str, across=0.5, down=0.5) -> None:
        """Press and release the mouse in an element: 0 is its left or upper edge, 1 the other."""
        x, y = self.move(selector, across, down)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move(self, selector: str, across=0.5, down=0.5) -> tuple[float, float]:
        left, top, width, height = self.box(selector)
        x, y = left + across * width, top + down * height
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def press(self, key: str) -> None:
        options = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **options, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def pixels(self, selector: str) -> np.ndarray:
        """(height, width, 3) of what the window shows of an element, 0 to 255."""
        left, top, width, height = self.box(selector)
        x, y = self.evaluate("[scrollX, scrollY]")
        clip = {"x": left + x, "y": top + y, "width": width, "height": height, "scale": 1}
        image = self.call("Page.captureScreenshot", clip=clip)["data"]
        return 255 * imread(io.BytesIO(base64.b64decode(image)), format="png")[:, :, :3]

    def problems(self) -> list[dict]:
        """Exceptions, lines of the console, dialogs, and requests for anything but the page."""
        bad = {
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        }
        found = [event for event in self.events if event["method"] in bad]
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if event["params"]["type"] != "Document" and not url.startswith("data:"):
                    found.append(event)
        return found


def is_loaded(event: dict, loader: str) -> bool:
    parameters = event["params"]
    return parameters.get("loaderId") == loader and parameters.get("name") == "load"
