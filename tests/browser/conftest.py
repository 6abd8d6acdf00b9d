"""The real canvas in a headless Chromium, against a real server process.

Every canvas that a test opens must stay quiet: no console error, no page error, no failed request and no request to
anything but the server, unless the test says so.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60_000  # ms; a busy machine may take long, and no test passes by waiting
SIZE = {"width": 1500, "height": 900}
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# The server keeps what a canvas sets; no test is to find what another left.
USUAL = {"Comfy.RightSidePanel.IsOpen": False, "Comfy.VueNodes.Enabled": False, "Comfy.Queue.History.Expanded": False}
EVENTS = (
    "status", "execution_start", "executing", "progress_state", "b_preview_with_metadata", "executed",
    "execution_success", "execution_error", "execution_interrupted",
)  # fmt: skip
# Keeps what the server tells the canvas, and which requests it has answered, in order.
RECORDER = """types => {
  window.recorded = [];
  for (const type of types) app.api.addEventListener(type, ({ detail }) => recorded.push({ type, detail }));
  const send = window.fetch;
  window.fetch = async (...request) => {
    const answer = await send(...request);
    recorded.push({ type: "answer", detail: new URL(answer.url).pathname });
    return answer;
  };
}"""
NODE = "title => app.graph._nodes.find(n => n.title === title).id"
WIDGET = "([title, name]) => app.graph._nodes.find(n => n.title === title).widgets.find(w => w.name === name)"
PLACE = """([title, name]) => {
  const node = app.graph._nodes.find(n => n.title === title), { scale, offset } = app.canvas.ds;
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const widget = node.widgets?.find(w => w.name === name);
  const body = [0, 0, ...node.size], row = widget && [0, widget.y, node.size[0], widget.computedHeight ?? 20];
  const [x, y, width, height] = row ?? body;
  return {
    x: left + (node.pos[0] + x + offset[0]) * scale, y: top + (node.pos[1] + y + offset[1]) * scale,
    width: width * scale, height: height * scale,
  };
}"""


class Server:
    """`fluxcanvas serve` as a process of its own, with a base folder that outlives it."""

    def __init__(self, base: Path) -> None:
        self.base, self.log = base, base / "server.log"
        self.start()

    def start(self) -> None:
        """Start and wait for the address that it prints."""
        command = [sys.executable, "-m", "fluxcanvas.web.host", "serve", "--no-open", "--port", "0", "--device", "cpu"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--base-directory", str(self.base)], cwd=self.base, stdout=log, stderr=subprocess.STDOUT
            )
        self.url = self._address(time.monotonic() + PATIENCE / 1000)

    def _address(self, deadline: float) -> str:
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", self.log.read_text()):
                return found.group()
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    def post(self, path: str, value: Any) -> None:
        """POST a JSON value."""
        body, kind = json.dumps(value).encode(), {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(self.url + path, body, kind), timeout=30).close()

    def kill(self) -> None:
        """End it without a chance to tidy up."""
        self.process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self.process.wait()

    def pictures(self, prefix: str = "") -> list[Path]:
        """What SaveImage has written, in order."""
        return sorted((self.base / "output").glob(f"{prefix}*.png"))


class Canvas:
    """A page with the canvas in a browser profile of its own."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.server, self.complaints = server, []
        self.requests: list[str] = []
        self._answered: set[str] = set()
        self.profile = browser.new_context(viewport=SIZE)
        self.profile.set_default_timeout(PATIENCE)
        self.page = self.profile.new_page()
        self._watch()

    def _watch(self) -> None:
        def complain(kind: str, text: object) -> None:
            self.complaints.append(f"{kind}: {text}")

        def requested(request: Any) -> None:
            self.requests.append(request.url)
            if not request.url.startswith((self.server.url, "data:", "blob:")):
                complain("request to the outside", request.url)

        def answered(response: Any) -> None:
            self._answered.add(response.url)
            if response.status >= 400:
                complain("answer", f"{response.status} {response.url}")

        def failed(request: Any) -> None:
            # The canvas drops the empty bodies of some answers, and a preview as soon as the next one is there.
            dropped = request.url in self._answered or request.url.startswith("blob:")
            if request.failure != "net::ERR_ABORTED" or not dropped:
                complain("failed request", f"{request.method} {request.url} {request.failure}")

        self.profile.on("request", requested)
        self.profile.on("response", answered)
        self.profile.on("requestfailed", failed)
        self.page.on("console", lambda said: complain("console", said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: complain("page error", error))

    def expect(self, *patterns: str) -> None:
        """Each pattern must have been complained of; those complaints are then settled."""
        for pattern in patterns:
            kept = [one for one in self.complaints if not re.search(pattern, one)]
            assert len(kept) < len(self.complaints), f"nothing matches {pattern!r}: {self.complaints}"
            self.complaints = kept

    # ------------------------------------------------------------ opening
    def open(self, query: str = "") -> Canvas:
        """Load the page and wait until the canvas answers."""
        self.page.goto(self.server.url + query)
        self.wait("Boolean(window.app?.extensionManager && app.graph && app.canvas)")
        self.page.evaluate(RECORDER, EVENTS)
        return self

    def open_template(self, name: str = "text-to-image") -> Canvas:
        """Open a shipped workflow as `serve` does."""
        self.open(f"?template={name}&source=fluxcanvas")
        self.wait("app.graph._nodes.length > 3")
        return self

    def load(self, workflow: Any, name: str | None = None) -> None:
        """Open a UI-format workflow."""
        self.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [workflow, name])

    def wait(self, condition: str, argument: Any = None) -> Any:
        """Wait until a JavaScript condition holds; its value."""
        return self.page.wait_for_function(condition, arg=argument, timeout=PATIENCE).json_value()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition of Python holds, such as one on what the screen shows."""
        deadline = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert time.monotonic() < deadline, "it did not come to hold"
            self.page.wait_for_timeout(100)

    def command(self, name: str) -> None:
        """Execute one of the canvas's commands without waiting for what it opens."""
        self.page.evaluate("name => { app.extensionManager.command.execute(name) }", name)

    def set(self, setting: str, value: Any) -> None:
        """Change one of the canvas's settings."""
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])

    # ------------------------------------------------------------ the graph
    def node(self, title: str) -> str:
        """The id of the node with a title."""
        return str(self.page.evaluate(NODE, title))

    def value(self, title: str, name: str) -> Any:
        """A widget's value."""
        return self.page.evaluate(f"at => ({WIDGET})(at).value", [title, name])

    def put(self, title: str, name: str, value: Any) -> None:
        """Set a widget's value as a script or a loaded file would, past the checks of typing."""
        self.page.evaluate(f"([title, name, value]) => {{ ({WIDGET})([title, name]).value = value }}",
                           [title, name, value])  # fmt: skip

    def type(self, title: str, name: str, text: str) -> None:
        """Type a number into a widget, as a user does: double click, text, Enter."""
        field = self.page.locator(".graphdialog input")

        def opened() -> bool:
            """A busy machine may take the two clicks for single ones; a user would then click again."""
            box = self.place(title, name)
            self.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            self.page.wait_for_timeout(500)
            return field.count() == 1

        self.until(opened)
        field.fill(text)
        field.press("Enter")
        field.wait_for(state="detached")

    def place(self, title: str, widget: str | None = None) -> dict[str, float]:
        """Where a node's body, or a widget, lies on the page."""
        return self.page.evaluate(PLACE, [title, widget])

    def graph(self) -> Any:
        """The workflow as the canvas would save it."""
        return self.page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")

    # ------------------------------------------------------------ running
    def press_run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def recorded(self, type: str) -> list[Any]:
        """What the server has told since the last `forget`."""
        return self.page.evaluate("type => recorded.filter(e => e.type === type).map(e => e.detail)", type)

    def story(self) -> list[dict[str, Any]]:
        """All of it, in order."""
        return self.page.evaluate("recorded.filter(e => e.type !== 'b_preview_with_metadata')")

    def forget(self) -> None:
        self.page.evaluate("recorded.length = 0")

    def wait_for(self, type: str) -> Any:
        """Wait until the server has told of something; what it told first."""
        return self.wait("type => recorded.find(e => e.type === type)", type)["detail"]

    def run(self) -> None:
        """Press Run, and wait until the server has done it, successfully."""
        self.forget()
        self.press_run()
        ends = ["execution_success", "execution_error", "execution_interrupted"]
        end = self.wait("ends => recorded.find(e => ends.includes(e.type))", ends)
        assert end["type"] == "execution_success", end

    def jobs(self) -> list[dict[str, Any]]:
        """The server's jobs, newest first."""
        return self.page.evaluate("async () => (await (await app.api.fetchApi('/jobs?limit=50')).json()).jobs")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a base folder of its own."""
    running = Server(tmp_path_factory.mktemp("base"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A headless Chromium. Ended with each file: while it runs, no other test could use asyncio in this process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def new_canvas(browser: Any, server: Server) -> Iterator[Callable[[], Canvas]]:
    """Opens canvases, each in a fresh browser profile. Whatever they complained of and no test expected is an error."""
    opened: list[Canvas] = []

    def make() -> Canvas:
        server.post("settings", USUAL)
        opened.append(Canvas(browser, server))
        return opened[-1]

    yield make
    for canvas in opened:
        canvas.profile.close()
    assert [canvas.complaints for canvas in opened] == [[] for _ in opened]


@pytest.fixture
def canvas(new_canvas: Callable[[], Canvas]) -> Canvas:
    """A canvas in a fresh browser profile, not opened yet."""
    return new_canvas()


@pytest.fixture(scope="session")
def shipped(checkout: Path) -> dict[str, Any]:
    """The shipped workflows by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((checkout / "workflows").glob("*.json"))}
