"""Who is let in, and that no route leaves its folders."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from fluxcanvas.web.host.options import HostOptions
from fluxcanvas.web.host.security import HostRule, host_name, is_loopback

FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:8188",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "",
    "a b",
    "127.0.0.1:port",
    "user@127.0.0.1",
    "127.0.0.1/x",
    "192.168.1.5",
    "[::2]",
    "0.0.0.0",
    "127.0.0.1#",
    "localhost, evil.example",
]
FOREIGN_ORIGINS = [
    "null",
    "http://evil.example",
    "https://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:3000",
    "file://",
    "chrome-extension://abc",
    "",
    "http://127.0.0.1.evil.example",
    "http://",
    "http://[",
    "http://a]b",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_other_hosts_are_refused(server, host):
    for path in ("/", "/api/prompt", "/ws", "/view?filename=a", "/nothing"):
        reply = server.request("GET", path, Host=host)
        assert reply.status in (400, 403), path
        assert b"<!doctype" not in reply.body.lower()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}", "localhost."])
def test_own_hosts_are_served(server, host):
    assert server.request("GET", "/api/prompt", Host=host.format(port=server.port)).status == 200


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_other_origins_are_refused(server, graph, origin):
    assert server.post("/prompt", {"prompt": graph()}, Origin=origin).status == 403
    assert server.request("GET", "/api/history", Origin=origin).status == 403
    assert server.request("OPTIONS", "/api/prompt", Origin=origin).status == 403
    assert server.request("POST", "/userdata/x.json", b"{}", Origin=origin).status == 403
    assert server.get("/history").json() == {}


def test_the_own_origin_is_served(server, graph):
    assert server.post("/prompt", {"prompt": graph()}, Origin=f"http://{server.host}").status == 200
    assert server.post("/prompt", {"prompt": graph(red=0.1)}, Origin=f"HTTP://{server.host}").status == 200


def test_a_foreign_page_cannot_write_terminal_codes_into_the_log(server, caplog):
    with caplog.at_level("WARNING", logger="fluxcanvas"):
        assert server.request("GET", "/%1b]0;mine%07%0aall%20is%20well", Host="evil.example").status == 403
    (line,) = [record.getMessage() for record in caplog.records if "Refused" in record.getMessage()]
    assert line.isprintable() and "%1b]0;mine%07%0a" in line


def test_requests_that_browsers_mark_as_foreign_are_refused(server):
    for path in ("/", "/view?filename=a", "/api/prompt", "/ws"):
        assert server.request("GET", path, Sec_Fetch_Site="cross-site").status == 403
    for mark in ("same-origin", "none"):
        assert server.request("GET", "/api/prompt", Sec_Fetch_Site=mark).status == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_the_websocket_is_guarded(server, headers):
    async def connect() -> int:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.ws_connect(f"http://{server.host}/ws", headers=headers):
                    return 101
            except aiohttp.WSServerHandshakeError as error:
                return error.status

    assert asyncio.run(connect()) == 403


def test_a_form_in_a_page_cannot_post_json(server, graph):
    import json

    body = json.dumps({"prompt": graph()}).encode()
    own = f"http://{server.host}"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        for path in ("/prompt", "/api/queue", "/history", "/jobs/cancel", "/free", "/interrupt"):
            assert server.request("POST", path, body, Origin=own, Content_Type=kind).status == 415, (kind, path)
    # programs, which send no Origin, may send what curl sends
    assert server.request("POST", "/prompt", body, Content_Type="application/x-www-form-urlencoded").status == 200


def test_every_reply_has_its_headers(server):
    for path in ("/", "/api/prompt", "/nothing", "/scripts/app.js", "/extensions/toys.v1/toys.js"):
        headers = server.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_the_page_may_reach_nothing_but_the_server(server):
    policy = server.get("/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'self'" and rules["object-src"] == "'none'"
    allowed = {
        "'self'",
        "'none'",
        "'unsafe-inline'",
        "'unsafe-eval'",
        "data:",
        "blob:",
        f"ws://{server.host}",
        f"wss://{server.host}",
    }
    assert {source for value in rules.values() for source in value.split()} <= allowed


EVIL = [
    "../secret.txt",
    "..%2fsecret.txt",
    "%2e%2e/secret.txt",
    "%2e%2e%2fsecret.txt",
    "..%5csecret.txt",
    "....//secret.txt",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "//etc/passwd",
    "C:%5csecret.txt",
    "C:secret.txt",
    "%5c%5chost%5cshare",
    "secret.txt%00",
    "a/../../secret.txt",
    "%252e%252e%252fsecret.txt",
    "..%c0%afsecret.txt",
    "link/secret.txt",
    "link%2fsecret.txt",
    "secret.lnk",
]
ROUTES = [
    "/view?filename={}",
    "/view?filename=a.png&subfolder={}",
    "/view?type={}&filename=a.png",
    "/api/view?type=input&filename={}",
    "/userdata/{}",
    "/api/userdata?dir={}",
    "/extensions/toys.v1/{}",
    "/extensions/{}",
    "/extensions/core/{}",
    "/workflow_templates/toys.v1/{}",
    "/api/workflow_templates/{}/x.json",
    "/docs/{}",
    "/scripts/{}",
    "/assets/{}",
    "/{}",
    "/templates/{}",
    "/models/{}",
    "/experiment/models/{}",
    "/experiment/models/preview/loras/0/{}",
    "/experiment/models/preview/{}/0/x.safetensors",
    "/view_metadata/loras?filename={}",
    "/view_metadata/{}?filename=x",
    "/internal/files/{}",
    "/global_subgraphs/{}",
    "/object_info/{}",
    "/history/{}",
    "/jobs/{}",
    "/settings/{}",
]


@pytest.fixture
def with_secrets(server, tmp_path):
    """Secrets beside every folder that is served, and links that lead to them."""
    folders = server.context.folders
    secret = "the secret of the neighbours"
    served = [
        folders.input,
        folders.output,
        folders.temp,
        server.context.userdata.root,
        server.base / "models" / "loras",
        server.base / "custom_nodes" / "toys.v1",
        server.base / "custom_nodes" / "toys.v1" / "js",
    ]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(secret)
    for folder in served:
        (folder.parent / "secret.txt").write_text(secret)
        (folder / "link").symlink_to(outside)
        (folder / "secret.lnk").symlink_to(outside / "secret.txt")
    yield server
    for folder in served:
        (folder.parent / "secret.txt").unlink(missing_ok=True)


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_leaves_its_folders(with_secrets, route):
    for path in EVIL:
        reply = with_secrets.request("GET", route.format(path))
        assert b"neighbours" not in reply.body and b"root:" not in reply.body, path
        assert reply.status < 500, path
        if not route.startswith(("/settings", "/object_info", "/history")):
            assert reply.status in (400, 403, 404), path


def test_unknown_paths_are_truly_not_found(server):
    for path in (
        "/api",
        "/api/",
        "/index.htm",
        "/api/assets",
        "/api/v2/userdata",
        "/templates/x.json",
        "/extensions/unknown/x.js",
        "/docs/Node/en.md",
        "/scripts/none.js",
        "/assets/",
        "/scripts",
        "/api/experiment/models/none",
        "/ws/x",
        "/internal/logs/none",
        "/api/api/prompt",
        "/api/internal/logs",
        "/api/ws",
    ):
        reply = server.get(path)
        assert reply.status == 404, path
        assert not reply.headers["content-type"].startswith("text/html"), path
    assert server.request("PUT", "/prompt").status == 405


def test_names_of_hosts():
    assert host_name("LocalHost:80") == "localhost" and host_name("[::1]:1") == "::1" and host_name("a:b") is None
    assert (
        is_loopback("127.5.5.5")
        and is_loopback("::1")
        and not is_loopback("0.0.0.0")
        and not is_loopback("example.org")
    )


def test_a_server_on_the_network_is_reached_by_address_or_configured_name():
    rule = HostRule(HostOptions(host="0.0.0.0", allowed_hosts=("studio.lan",)))
    assert rule.allows("192.168.1.5:8188") and rule.allows("studio.lan") and rule.allows("localhost")
    assert not rule.allows("evil.example")
    assert not HostRule(HostOptions()).allows("192.168.1.5:8188")
