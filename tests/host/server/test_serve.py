"""The command: starting, the address, ending by a signal, what keeps it from starting."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.web.host.app import address, build_app, listen, serve
from fluxcanvas.web.host.options import HostOptions

PROGRAM = """
import sys
import threading
from pathlib import Path
from fluxcanvas.web.host.app import serve
from fluxcanvas.web.host.options import HostOptions
sys.exit(serve(HostOptions(port=0, base_directory=Path(sys.argv[1]), open_browser=False, device="cpu")))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_while_a_prompt_runs(base: Path, graph, number):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(base)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(
            "POST", "/prompt", json.dumps({"prompt": graph("ToyWait")}), {"Content-Type": "application/json"}
        )
        assert connection.getresponse().status == 200
        with socket.create_connection(("127.0.0.1", port)) as listener:  # a browser that stays connected
            listener.sendall(
                f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
            )
            assert listener.recv(12) == b"HTTP/1.1 101"
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_the_worker_ends_with_the_application(base, serve, graph):
    before = set(threading.enumerate())
    with serve(base) as server:
        server.post("/prompt", {"prompt": graph("ToyWait")})
        server.post("/prompt", {"prompt": graph("ToyWait", red=0.1)})
        temp = server.context.folders.temp
        started = {thread for thread in set(threading.enumerate()) - before if thread.name == "fluxcanvas worker"}
        assert started
    assert not [thread for thread in started if thread.is_alive()]
    assert not temp.exists()


def test_a_taken_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FluxError, match=f"Port {port} is in use.*--port"):
            serve(HostOptions(port=port, open_browser=False))


def test_an_address_of_another_machine_is_told():
    with pytest.raises(FluxError, match=r"cannot listen on 192\.0\.2\.1"):
        listen(HostOptions(host="192.0.2.1", port=0))


@pytest.mark.parametrize(
    "host, shown", [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "localhost")]
)
def test_the_address_to_open(host, shown):
    with listen(HostOptions(host=host, port=0)) as bound:
        assert address(HostOptions(host=host), bound) == f"http://{shown}:{bound.getsockname()[1]}/"


def test_the_browser_is_sent_to_the_starter(monkeypatch):
    from fluxcanvas.web.host import app

    opened = []
    monkeypatch.setattr(
        app.threading, "Thread", lambda target, args, daemon: type("T", (), {"start": lambda _: target(*args)})()
    )
    monkeypatch.setattr(app.webbrowser, "open", opened.append)
    app._open_browser("http://127.0.0.1:1/")
    assert opened == ["http://127.0.0.1:1/?template=text-to-image&source=fluxcanvas"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"models": (Path("/no/such/folder"),)}, "/no/such/folder does not exist"),
        ({"extra_model_paths_config": (Path("/no/such.yaml"),)}, "no/such.yaml cannot be read"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_options_that_cannot_be_used_are_told(tmp_path, options, says):
    with pytest.raises(FluxError, match=says):
        build_app(HostOptions(base_directory=tmp_path, **options))


def test_a_base_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FluxError, match="--base-directory"):
        build_app(HostOptions(base_directory=tmp_path / "file" / "base"))
