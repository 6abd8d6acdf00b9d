"""The canvas opens quietly, on our workflows, with help for our nodes, and to nobody but its own pages."""

from __future__ import annotations

import http.client
import http.server
import threading
from urllib.parse import urlsplit

import pytest


def test_opens_quietly_and_talks_to_the_server_alone(canvas):
    canvas.open()
    canvas.wait("app.api.socket?.readyState === WebSocket.OPEN")
    canvas.page.wait_for_load_state("networkidle")
    assert {urlsplit(url).netloc for url in canvas.requests if url.startswith(("http", "ws"))} == {
        urlsplit(canvas.server.url).netloc
    }
    assert canvas.complaints == []


def test_opens_the_starter_without_a_word_about_missing_nodes(canvas, shipped):
    canvas.open_template()
    starter = shipped["text-to-image"]
    nodes = {str(node["id"]): node["type"] for node in canvas.graph()["nodes"]}
    assert nodes == {str(node["id"]): node["type"] for node in starter["nodes"]}
    assert len(canvas.graph()["links"]) == len(starter["links"])
    canvas.page.wait_for_load_state("networkidle")
    assert canvas.page.get_by_role("dialog").count() == 0
    known = "app.graph._nodes.every(node => !node.has_errors && node.type in LiteGraph.registered_node_types)"
    assert canvas.page.evaluate(known)


def test_a_new_profile_is_greeted_with_every_template_and_its_picture(canvas, shipped):
    canvas.open()
    cards = canvas.page.locator("[data-testid^='template-workflow-']")

    def all_shown():  # more come when the last is scrolled to
        cards.last.scroll_into_view_if_needed()
        return cards.count() >= len(shipped)

    canvas.until(all_shown)
    for name in shipped:
        template = canvas.page.get_by_test_id(f"template-workflow-{name}")
        template.scroll_into_view_if_needed()
        handle = template.locator("img").first.element_handle()
        canvas.page.wait_for_function("image => image.naturalWidth >= 128", arg=handle)
    assert cards.count() == len(shipped)
    wanted = {f"{canvas.server.url}api/workflow_templates/fluxcanvas/{name}.jpg" for name in shipped}
    assert wanted <= set(canvas.requests)
    canvas.page.get_by_test_id("template-workflow-text-to-image").locator("img").first.click()
    canvas.wait("count => app.graph._nodes.length === count", len(shipped["text-to-image"]["nodes"]))


def test_the_menu_entry_opens_the_starter(canvas, shipped):
    canvas.open()
    canvas.command("FluxCanvas.OpenStarter")
    canvas.wait("count => app.graph._nodes.length === count", len(shipped["text-to-image"]["nodes"]))


def test_every_node_of_ours_has_a_help_page_and_the_panel_shows_it(canvas):
    canvas.open_template()
    pages = canvas.page.evaluate("""async () => {
      const own = Object.keys(LiteGraph.registered_node_types).filter(type => type.startsWith("FluxCanvas_"));
      return Promise.all(own.map(async type => {
        const answer = await fetch(`/extensions/fluxcanvas/docs/${type}/en.md`);
        return [type, answer.status, answer.headers.get("content-type"), await answer.text()];
      }));
    }""")
    assert len(pages) >= 7
    for name, status, kind, text in pages:
        assert (status, kind.partition(";")[0]) == (200, "text/markdown"), name
        assert text.startswith("# "), name

    canvas.page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", canvas.node("Sample"))
    canvas.page.get_by_test_id("info-button").click()
    panel = canvas.page.locator(".node-help-content")
    panel.get_by_role("heading", name="Sample").wait_for()
    assert "from noise" in panel.inner_text() or "begins with noise" in panel.inner_text()


@pytest.fixture
def foreign_page():
    """The address of an empty page of another origin on this machine; at /null, of a page without an origin."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            if self.path == "/null":
                self.send_header("Content-Security-Policy", "sandbox allow-scripts")
            self.end_headers()
            self.wfile.write(b"<link rel=icon href=data:,>a page of someone else")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


# Requests that a browser sends to a stranger without asking it first, and what the page gets to see of the answers.
FOREIGN = """async url => {
  const tried = async (path, options) => {
    try { return (await fetch(url + path, options)).status } catch { return "refused" }
  };
  const socket = new WebSocket(url.replace("http", "ws") + "ws?clientId=foreign");
  const opened = await new Promise(end => { socket.onopen = () => end(true); socket.onerror = () => end(false) });
  return [await tried("queue"), await tried("interrupt", { method: "POST", body: "{}", mode: "no-cors" }), opened];
}"""


@pytest.mark.parametrize("path", ["", "null"])
def test_a_foreign_page_cannot_talk_to_the_server(canvas, foreign_page, path):
    canvas.page.goto(foreign_page + path)
    assert canvas.page.evaluate("origin") == (path or foreign_page.rstrip("/"))
    assert canvas.page.evaluate(FOREIGN, canvas.server.url) == ["refused", "refused", False]
    canvas.expect("^request to the outside: .*/(null)?$")  # this page itself
    canvas.expect("^failed request: GET .*/queue ", "^failed request: POST .*/interrupt ")
    canvas.expect("^console: WebSocket .* Unexpected response code: 403", "^console: .*(CORS policy|ERR_)")


@pytest.mark.parametrize("origin", ["http://example.com", "http://localhost.example.com", "null"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/ws"), ("GET", "/queue"), ("POST", "/interrupt")])
def test_the_server_itself_refuses_foreign_origins(server, origin, method, path):
    assert status(server, method, path, Origin=origin) == 403


@pytest.mark.parametrize(("method", "path", "answer"), [("GET", "/ws", 101), ("GET", "/queue", 200)])
def test_the_server_answers_its_own_pages_and_scripts(server, method, path, answer):
    assert status(server, method, path, Origin=server.url.rstrip("/")) == answer
    assert status(server, method, path) == answer


def status(server, method, path, **headers):
    """The status of the answer to a request, which asks for a WebSocket where there is one."""
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request(method, path, headers={**(upgrade if path == "/ws" else {}), **headers})
    answer = connection.getresponse().status
    connection.close()
    return answer
