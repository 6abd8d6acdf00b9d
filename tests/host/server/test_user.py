"""Saved workflows and settings."""

from __future__ import annotations

import json

import pytest

WORKFLOW = "/api/userdata/workflows%2Fmine.json"


def test_a_workflow_is_saved_listed_moved_and_deleted(server):
    saved = server.request("POST", f"{WORKFLOW}?overwrite=false&full_info=true", b'{"nodes": []}').json()
    assert saved["path"] == "workflows/mine.json" and saved["size"] == 13 and saved["modified"] > 1_600_000_000_000
    assert server.get(WORKFLOW).json() == {"nodes": []}
    again = server.request("POST", f"{WORKFLOW}?overwrite=false", b"{}")
    assert again.status == 409 and server.get(WORKFLOW).json() == {"nodes": []}
    assert server.request("POST", f"{WORKFLOW}?overwrite=true", b"[1]").json() == "workflows/mine.json"
    query = "/api/userdata?dir=workflows&recurse=true&split=false&full_info=true"
    assert [entry["path"] for entry in server.get(query).json()] == ["mine.json"]
    moved = server.request(
        "POST", "/api/userdata/workflows%2Fmine.json/move/workflows%2Fsub%2Fyours.json?overwrite=false"
    )
    assert moved.json() == "workflows/sub/yours.json"
    assert server.get(WORKFLOW).status == 404
    assert server.get("/userdata?dir=workflows&recurse=true").json() == ["sub/yours.json"]
    assert server.get("/userdata?dir=workflows&recurse=true&split=true").json() == [
        ["sub/yours.json", "sub", "yours.json"]
    ]
    assert server.get("/userdata?dir=workflows").json() == []
    gone = server.request("DELETE", "/userdata/workflows%2Fsub%2Fyours.json")
    assert gone.status == 204 and gone.body == b""
    assert server.request("DELETE", "/userdata/workflows%2Fsub%2Fyours.json").status == 404


def test_moving_over_a_file_needs_leave(server):
    server.request("POST", "/userdata/a.json", b"1")
    server.request("POST", "/userdata/b.json", b"2")
    assert server.request("POST", "/userdata/a.json/move/b.json?overwrite=false").status == 409
    assert server.get("/userdata/b.json").json() == 2
    assert server.request("POST", "/userdata/a.json/move/b.json?full_info=true").json()["path"] == "b.json"
    assert server.get("/userdata/b.json").json() == 1
    assert server.request("POST", "/userdata/none.json/move/b.json").status == 404
    server.request("POST", "/userdata/folder%2Ffile.json", b"3")
    assert server.request("POST", "/userdata/folder", b"4").status == 409


def test_a_name_with_odd_characters_survives(server):
    name = "workflows%2F%C3%BCber%20100%25%20%23%3F%20%E2%82%AC.json"
    assert server.request("POST", f"/userdata/{name}", b"{}").json() == "workflows/über 100% #? €.json"
    assert server.get(f"/userdata/{name}").status == 200
    assert server.get("/userdata?dir=workflows").json() == ["über 100% #? €.json"]


@pytest.mark.parametrize(
    "name",
    [
        "..%2Fx",
        "%2e%2e%2fx",
        "..%5Cx",
        "%2Fetc%2Fpasswd",
        "C%3A%5Cx",
        "C%3Ax",
        "a%00b",
        "a%0d%0ab",
        "workflows%2F..%2F..%2Fx",
        "%2F%2Fhost%2Fshare",
        "..",
        "%2e%2e",
        "x" * 300,
        "a%2F" * 1200 + "x",
    ],
)
def test_no_path_leaves_the_folder(server, name):
    outside = server.context.userdata.root.parent / "x"
    for method in ("GET", "POST", "DELETE"):
        reply = server.request(method, f"/userdata/{name}", b"1" if method == "POST" else None)
        assert reply.status in (400, 403, 404, 405)
    for path in (f"/userdata/{name}/move/ok.json", f"/userdata/workflows%2Fmine.json/move/{name}"):
        assert server.request("POST", path).status in (400, 403, 404, 405)
    assert server.get(f"/userdata?dir={name}").status in (400, 403, 404)
    assert not outside.exists()
    assert not (server.context.folders.base / "user" / "x").exists()


def test_a_link_out_of_the_folder_is_not_followed(server, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    root = server.context.userdata.root
    (root / "link.txt").symlink_to(secret)
    (root / "all").symlink_to(tmp_path)
    assert server.get("/userdata/link.txt").status == 403
    assert server.get("/userdata/all%2Fsecret.txt").status == 403
    assert server.request("POST", "/userdata/link.txt", b"x").status == 403
    assert secret.read_text() == "secret"
    assert "link.txt" not in server.get("/userdata?dir=.&recurse=true").json()


def test_active_user_files_are_downloads(server):
    server.request("POST", "/userdata/page.html", b"<script>")
    reply = server.get("/userdata/page.html")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"].startswith("attachment")


def test_the_users_style_sheet(server):
    assert server.get("/user.css").body == b"" and server.get("/user.css").headers["content-type"].startswith(
        "text/css"
    )
    server.request("POST", "/api/userdata/user.css", b"a {}")
    for path in ("/user.css", "/api/userdata/user.css"):
        assert server.get(path).body == b"a {}" and server.get(path).headers["content-type"].startswith("text/css")


def test_settings_survive_a_restart(base, serve):
    with serve(base) as server:
        assert server.get("/api/settings").json() == {"Comfy.Notification.ShowVersionUpdates": False}
        # as the canvas sends it: JSON without a JSON content type
        server.request(
            "POST",
            "/api/settings/Comfy.Locale",
            b'"de"',
            Content_Type="text/plain;charset=UTF-8",
            Origin=f"http://{server.host}",
        )
        server.post("/settings", {"A.B": [1], "Comfy.TutorialCompleted": True, "C": None})
        server.post("/settings/Comfy.TutorialCompleted", True)
        server.request("POST", "/userdata/workflows%2Fw.json", b"{}")
    with serve(base) as server:
        settings = server.get("/settings").json()
        assert settings["Comfy.Locale"] == "de" and settings["A.B"] == [1] and settings["C"] is None
        assert "Comfy.TutorialCompleted" not in settings
        assert server.get("/settings/A.B").json() == [1] and server.get("/settings/unknown").json() is None
        assert server.get("/userdata/workflows%2Fw.json").status == 200
        server.post("/settings/Comfy.Notification.ShowVersionUpdates", True)
        assert server.get("/settings").json()["Comfy.Notification.ShowVersionUpdates"] is True
        assert server.get("/userdata?dir=.&recurse=true").json() == ["workflows/w.json"], "settings are no user file"


def test_wrong_settings_are_refused(server):
    assert server.post("/settings", [1]).status == 400
    assert server.request("POST", "/settings/x", b"{").status == 400
    assert server.post("/settings/x", "y" * (9 << 20)).status == 400
    assert server.get("/settings").json() == {"Comfy.Notification.ShowVersionUpdates": False}


def test_a_broken_settings_file_is_put_aside(base, serve):
    file = base / "user" / "fluxcanvas.settings.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"half')
    with serve(base) as server:
        server.post("/settings/x", 1)
        assert json.loads(file.read_text()) == {"x": 1}
    assert (base / "user" / "fluxcanvas.settings.broken.json").read_text() == '{"half'
