"""A headless Chromium, asked over its DevTools pipe what a page shows."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """with Browser(tmp_path) as browser: browser.open(url); browser.ask("document.title")"""

    def __init__(self, profile: Path, *options: str):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        script = f'exec 3<&{read} 4>&{write}; exec {CHROMIUM} "$@"'
        command = ["bash", "-c", script, "bash", "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={profile}", "--remote-debugging-pipe", *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self.number, self.left, self.errors = 0, b"", []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.send("Runtime.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        for descriptor in (self.read, self.write):
            os.close(descriptor)

    def send(self, method: str, **given):
        self.number += 1
        message = {"id": self.number, "method": method, "params": given}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def next(self) -> dict:
        while b"\0" not in self.left:
            part = os.read(self.read, 1 << 20)
            assert part, "Chromium has ended"
            self.left += part
        first, _, self.left = self.left.partition(b"\0")
        return json.loads(first)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def ask(self, expression: str):
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.send("Runtime.evaluate", **given)["result"].get("value")

    def until(self, expression: str, seconds: float = 20):
        """Waits until the expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"{expression} is not true after {seconds} s"
            time.sleep(0.1)

    def picture(self, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        import base64

        with contextlib.suppress(AssertionError):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.5)
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        path.write_bytes(base64.b64decode(shot["data"]))
