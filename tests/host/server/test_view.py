"""Viewing and uploading pictures."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo


@pytest.fixture
def outputs(server, png):
    folder = server.context.folders.output
    (folder / "sub").mkdir()
    (folder / "a.png").write_bytes(png((255, 0, 0, 128), mode="RGBA"))
    (folder / "sub" / "b.png").write_bytes(png("blue"))
    return server


def test_a_picture_is_sent_whole_in_ranges_and_by_head(outputs, png):
    whole = outputs.get("/api/view", filename="a.png")
    assert whole.status == 200 and whole.headers["content-type"] == "image/png"
    assert whole.body == png((255, 0, 0, 128), mode="RGBA")
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert outputs.get("/view", filename="b.png", subfolder="sub", type="output").status == 200
    head = outputs.request("HEAD", "/view?filename=a.png")
    assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) == len(whole.body)
    part = outputs.request("GET", "/view?filename=a.png", Range="bytes=1-3")
    assert part.status == 206 and part.body == b"PNG"


def test_previews_and_channels(outputs):
    preview = outputs.get("/view", filename="a.png", preview="webp;75")
    assert preview.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(preview.body)).format == "WEBP"
    jpeg = outputs.get("/view", filename="a.png", preview="jpeg;10")
    assert Image.open(io.BytesIO(jpeg.body)).format == "JPEG"
    for odd in ("", "gif;1", "webp;9999999", "webp;x"):
        assert outputs.get("/view", filename="a.png", preview=odd).status == 200
    colours = Image.open(io.BytesIO(outputs.get("/view", filename="a.png", channel="rgb").body))
    assert colours.mode == "RGB" and colours.getpixel((0, 0)) == (255, 0, 0)
    alpha = Image.open(io.BytesIO(outputs.get("/view", filename="a.png", channel="a").body))
    assert alpha.mode == "RGBA" and alpha.getpixel((0, 0)) == (0, 0, 0, 128)
    opaque = Image.open(io.BytesIO(outputs.get("/view", filename="b.png", subfolder="sub", channel="a").body))
    assert opaque.getpixel((0, 0))[3] == 255
    assert outputs.get("/view", filename="a.png", channel="x").status == 400


def test_what_is_not_there_or_wrong(outputs):
    assert outputs.get("/view").status == 400
    assert outputs.get("/view", filename="none.png").status == 404
    assert outputs.get("/view", filename="a.png", type="secret").status in (400, 403)
    assert outputs.get("/view", filename="a.png [output]", type="input").status == 200


@pytest.mark.parametrize(
    "name", ["page.html", "page.HTM", "draw.svg", "run.js", "style.css", "feed.xml", "x.xhtml", "noending"]
)
def test_active_content_is_a_download(outputs, name):
    (outputs.context.folders.output / name).write_text("<script>alert(1)</script>")
    reply = outputs.get("/view", filename=name)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in reply.headers["content-security-policy"]
    assert outputs.get("/view", filename=name, preview="webp;75").status == 400


def test_a_text_file_with_a_pictures_name_is_told(outputs):
    (outputs.context.folders.output / "fake.png").write_text("no picture")
    reply = outputs.get("/view", filename="fake.png", preview="webp;75")
    assert reply.status == 400 and "fake.png is not a picture" in reply.json()["error"]


def test_uploads_are_renamed_unless_they_are_the_same(server, png):
    red, blue = png("red"), png("blue")
    assert server.upload("/api/upload/image", "a.png", red).json() == {
        "name": "a.png",
        "subfolder": "",
        "type": "input",
    }
    assert server.upload("/upload/image", "a.png", red).json()["name"] == "a.png"
    assert server.upload("/upload/image", "a.png", blue).json()["name"] == "a (1).png"
    assert server.upload("/upload/image", "a.png", blue).json()["name"] == "a (1).png"
    assert server.upload("/upload/image", "a.png", blue, overwrite="true").json()["name"] == "a.png"
    assert server.get("/view", filename="a.png", type="input").body == blue
    there = server.upload("/upload/image", "b.png", red, subfolder="x/y", type="temp").json()
    assert there == {"name": "b.png", "subfolder": "x/y", "type": "temp"}
    assert server.get("/view", **{"filename": "b.png", "subfolder": "x/y", "type": "temp"}).body == red
    names = server.get("/internal/files/input").json()
    assert set(names) >= {"a.png", "a (1).png"} and names.index("a.png") < names.index("a (1).png")
    assert {"a.png", "a (1).png"} <= set(
        server.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"][0]
    )


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.png", b"not a picture", "a.png is not a picture"),
        ("a.png", b"", "a.png is not a picture"),
        ("a.html", b"<script>", "not a picture file"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture file"),
        ("a", b"x", "not a picture file"),
        (".png", b"x", "no plain file name"),
        ("a/b.png", b"x", "no plain file name"),
        ("../b.png", b"x", "leads out"),
        (".%5Cb.png", b"x", "no plain file name"),
        ("C:b.png", b"x", "not a relative path"),
        ("a\\\\b.png", b"x", "not a relative path"),
        ("/etc/b.png", b"x", "no plain file name"),
    ],
)
def test_uploads_that_are_refused(server, name, data, says):
    before = sorted(path.name for path in server.context.folders.input.iterdir())
    reply = server.upload("/upload/image", name, data)
    assert reply.status in (400, 403) and says in reply.json()["error"]
    assert sorted(path.name for path in server.context.folders.input.iterdir()) == before


def test_a_truncated_picture_is_refused(server, png):
    big = png("red", size=(200, 200))
    reply = server.upload("/upload/image", "cut.png", big[: len(big) // 2])
    assert reply.status == 400 and "cut.png" in reply.json()["error"]


@pytest.mark.parametrize(
    "fields", [{"subfolder": "../x"}, {"subfolder": "/etc"}, {"type": "user"}, {"subfolder": "a\\b"}]
)
def test_uploads_stay_in_their_folder(server, png, fields):
    assert server.upload("/upload/image", "a.png", png(), **fields).status == 403


def test_malformed_uploads(server):
    assert server.post("/upload/image", {"image": "x"}).status == 400
    assert server.request("POST", "/upload/image", b"x", Content_Type="multipart/form-data").status == 400
    odd_name = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a\0.png"\r\n\r\nx\r\n--b--\r\n'
    for form in (b"--b\r\n", odd_name):
        reply = server.request("POST", "/upload/image", form, Content_Type="multipart/form-data; boundary=b")
        assert reply.status == 400 and "malformed" in reply.json()["error"]
    assert server.upload("/upload/mask", "m.png", b"x").status == 400
    assert server.get("/prompt").status == 200


def test_an_upload_over_the_limit_is_refused(base, serve, png):
    with serve(base, max_upload_bytes=10_000) as server:
        assert server.get("/features").json()["max_upload_size"] == 10_000
        reply = server.upload("/upload/image", "a.png", b"x" * 20_000)
        assert reply.status == 413 and reply.json()["error"].endswith(".")


def test_a_mask_becomes_the_alpha_of_a_copy(server, png):
    info = PngInfo()
    info.add_text("workflow", '{"a": 1}')
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "green").save(buffer, "PNG", pnginfo=info)
    (server.context.folders.input / "photo.png").write_bytes(buffer.getvalue())
    mask = png((0, 0, 0, 40), mode="RGBA")
    reference = json.dumps({"filename": "photo.png", "subfolder": "", "type": "input"})
    told = server.upload("/upload/mask", "mask.png", mask, original_ref=reference, subfolder="clipspace").json()
    assert told == {"name": "mask.png", "subfolder": "clipspace", "type": "input"}
    masked = Image.open(io.BytesIO(server.get("/view", filename="mask.png", subfolder="clipspace", type="input").body))
    assert masked.getpixel((0, 0)) == (0, 128, 0, 40) and masked.text["workflow"] == '{"a": 1}'
    other = png((0, 0, 0, 40), size=(3, 3), mode="RGBA")
    assert "one size" in server.upload("/upload/mask", "m.png", other, original_ref=reference).json()["error"]
    gone = json.dumps({"filename": "gone.png", "type": "input"})
    assert server.upload("/upload/mask", "m.png", mask, original_ref=gone).status == 404
    for wrong in (
        "{",
        "[]",
        json.dumps({"filename": "../x", "type": "input"}),
        json.dumps({"filename": 5, "type": "input"}),
    ):
        assert server.upload("/upload/mask", "m.png", mask, original_ref=wrong).status in (400, 403)


def test_a_full_disk_is_told(server, png, monkeypatch):
    import errno

    from fluxcanvas.web.host import files

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    reply = server.upload("/upload/image", "a.png", png())
    assert reply.status == 507 and "No space is left" in reply.json()["error"]
    assert server.request("POST", "/userdata/w.json", b"{}").status == 507
    assert not [path for path in server.context.folders.input.iterdir() if path.name.endswith(".part")]
