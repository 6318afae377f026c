"""For tests: Chromium without a window, driven over a pipe by the DevTools protocol."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

TIMEOUT_SEC = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


def find_chromium():
    """Return the path of the program; None if it is not installed."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def require_chromium():
    """Return the path of the program; without it the test fails under CI, and skips elsewhere."""
    program = find_chromium()
    if program is None:
        problem = "Chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return program


class Browser:
    """A browser with a new profile in ``folder``; :meth:`open` gives pages."""

    def __init__(self, program, folder):
        to_it, from_it = os.pipe(), os.pipe()
        # High numbers, so that neither is overwritten while they become 3 and 4.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (to_it[0], from_it[1])]

        def set_up():
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        own = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Root can have none.
        command = [program, *_OPTIONS, *own, f"--user-data-dir={folder}", "about:blank"]
        with open(folder / "log.txt", "wb") as log:
            self._process = subprocess.Popen(
                command, preexec_fn=set_up, close_fds=False, stdout=log, stderr=log
            )
        for end in (to_it[0], from_it[1], *theirs):
            os.close(end)
        self._to, self._from = to_it[1], from_it[0]
        self._buffer, self._number = b"", 0
        self.events = []

    def call(self, method, session=None, **params):
        """Return the result of a command; events that come before it are kept."""
        self._number += 1
        message = dict(id=self._number, method=method, params=params)
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def _receive(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], TIMEOUT_SEC)
            assert ready, "the browser does not answer"
            content = os.read(self._from, 1 << 20)
            assert content, "the browser has ended"
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1200, height=900, dark=False):
        """Return the page of a file, once its script has run."""
        return Page(self, path, width, height, dark)

    def close(self):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


class Page:
    """A page in a tab of its own, with what went wrong in it."""

    def __init__(self, browser, path, width, height, dark):
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        found = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait("document.documentElement?.dataset.ready")

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def run(self, script):
        """Return the value of an expression in the page."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script):
        """Wait until an expression is true."""
        deadline = time.monotonic() + TIMEOUT_SEC
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)

    def press(self, key):
        """Press a key where the focus is."""
        words = dict(key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        if key == "Enter":
            words["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **words)
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)

    def mouse(self, kind, x, y):
        look = dict(button="left", clickCount=1, buttons=0 if kind == "mouseReleased" else 1)
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **look)

    def screenshot(self):
        """Return a PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = dict(x=0, y=0, width=size["width"], height=min(size["height"], 16_000), scale=1)
        shot = dict(format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(self.call("Page.captureScreenshot", **shot)["data"])

    @property
    def problems(self):
        """What the console shows of this page: errors, warnings, exceptions, refused requests."""
        self.run("0")
        return [event for event in self._own_events() if _is_problem(event)]

    @property
    def requests(self):
        """Addresses that the page asked for, without pictures that it holds itself."""
        self.run("0")
        sent = [e for e in self._own_events() if e["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    def _own_events(self):
        return [e for e in self._browser.events if e.get("sessionId") == self._session]


def _is_problem(event):
    if event["method"] == "Runtime.consoleAPICalled":
        return event["params"]["type"] in ("error", "warning", "assert")
    return event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
