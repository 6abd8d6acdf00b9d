"""Model folders, extra_model_paths.yaml, and paths that stay where they belong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.web.host import files
from fluxcanvas.web.host.files import DiskFull, PathError, contained, relative, write_atomic
from fluxcanvas.web.host.folders import Folders, base_directory
from fluxcanvas.web.host.options import HostOptions


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


def test_the_base_directory_rule(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUXCANVAS_HOME", str(tmp_path / "home"))
    assert base_directory(tmp_path / "given") == tmp_path / "given"
    assert base_directory() == tmp_path / "home"


def test_models_of_both_folder_names_are_listed_and_found(base):
    put(base / "models" / "unet" / "old.safetensors")
    put(base / "models" / "diffusion_models" / "sub" / "new.gguf")
    put(base / "models" / "clip" / "clip_l.safetensors")
    put(base / "models" / "diffusion_models" / "notes.txt")
    put(base / "models" / "diffusion_models" / "pickle.ckpt")
    folders = Folders(base)
    assert folders.list("diffusion_models") == ["old.safetensors", "sub/new.gguf"] == folders.list("unet")
    assert folders.list("text_encoders") == folders.list("clip") == ["clip_l.safetensors"]
    assert folders.resolve("unet", "sub/new.gguf") == base / "models" / "diffusion_models" / "sub" / "new.gguf"
    put(base / "models" / "diffusion_models" / "later.safetensors")
    assert "later.safetensors" in folders.list("diffusion_models")


def test_folders_of_models_are_listed_by_what_lies_in_them(base):
    put(base / "models" / "diffusers" / "FLUX" / "model_index.json")
    put(base / "models" / "diffusers" / "FLUX" / "vae" / "a.safetensors")
    put(base / "models" / "diffusers" / "other" / "a.safetensors")
    assert Folders(base).list("diffusers") == ["FLUX"]
    assert Folders(base).resolve("diffusers", "FLUX").is_dir()


def test_an_unknown_model_names_the_folders_searched(base):
    with pytest.raises(FluxError, match=r"gone\.safetensors.*diffusion_models.*unet"):
        Folders(base).resolve("diffusion_models", "gone.safetensors")
    with pytest.raises(FluxError, match="no model category 'nonsense'"):
        Folders(base).list("nonsense")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "..\\outside.safetensors", "C:x", "a\0b", "sub/../../x"]
)
def test_a_model_name_cannot_lead_out(base, name):
    put(base / "models" / "outside.safetensors")
    (base / "models" / "vae").mkdir()
    with pytest.raises(FluxError):
        Folders(base).resolve("vae", name)


def test_a_linked_model_on_another_disk_is_found(base, tmp_path):
    put(tmp_path / "disk" / "big.safetensors")
    (base / "models" / "vae").mkdir(parents=True)
    (base / "models" / "vae" / "linked").symlink_to(tmp_path / "disk")
    (base / "models" / "vae" / "loop").symlink_to(base / "models" / "vae")
    folders = Folders(base)
    assert "linked/big.safetensors" in folders.list("vae")
    assert folders.resolve("vae", "linked/big.safetensors").is_file()


def test_further_model_roots_come_first(base, tmp_path):
    put(base / "models" / "vae" / "ae.safetensors", b"own")
    put(tmp_path / "more" / "vae" / "ae.safetensors", b"more")
    folders = Folders.from_options(HostOptions(base_directory=base, models=(tmp_path / "more",)))
    assert folders.list("vae") == ["ae.safetensors"]
    assert folders.resolve("vae", "ae.safetensors").read_bytes() == b"more"


CONFIG = """
comfyui:
    base_path: {base}
    is_default: true
    unet: models/unet
    clip: |
        models/clip
        models/text_encoders
    custom_nodes: custom_nodes
    my_kind: things
plain:
    loras: relative/loras
empty:
"""


def test_extra_model_paths(base, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFY_ROOT", str(tmp_path / "comfy"))
    put(tmp_path / "comfy" / "models" / "unet" / "flux.safetensors", b"comfy")
    put(base / "models" / "diffusion_models" / "flux.safetensors", b"own")
    put(tmp_path / "comfy" / "models" / "text_encoders" / "t5.safetensors")
    put(tmp_path / "conf" / "relative" / "loras" / "ink.safetensors")
    config = put(tmp_path / "conf" / "extra.yaml", CONFIG.format(base="$COMFY_ROOT").encode())
    folders = Folders(base, extra_config=[config])
    assert folders.resolve("diffusion_models", "flux.safetensors").read_bytes() == b"comfy", "is_default goes first"
    assert folders.list("clip") == ["t5.safetensors"]
    assert folders.list("loras") == ["ink.safetensors"]
    assert folders.roots("my_kind") == [tmp_path / "comfy" / "things"]
    assert folders.custom_nodes == [tmp_path / "comfy" / "custom_nodes", base / "custom_nodes"]


def test_a_relative_base_path_counts_from_the_file(base, tmp_path):
    config = put(tmp_path / "conf" / "extra.yaml", b"a:\n  base_path: ../comfy\n  vae: models/vae\n")
    assert Folders(base, extra_config=[config]).roots("vae")[-1] == tmp_path / "comfy" / "models" / "vae"


def test_the_base_directorys_own_file_is_read(base):
    put(base / "extra_model_paths.yaml", b"a:\n  vae: /somewhere/vae\n")
    assert Folders(base).roots("vae")[-1] == Path("/somewhere/vae")


@pytest.mark.parametrize(
    "text, says",
    [
        (b"a: [unclosed", "not valid YAML"),
        (b"- a\n- b\n", "named sections"),
        (b"a: text", "Section 'a'"),
        (b"a:\n  vae: 5\n", "'vae' in section 'a'"),
        (b"a:\n  vae: [x]\n", "'vae' in section 'a'"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_wrong_path_file_is_told(base, tmp_path, text, says):
    config = put(tmp_path / "extra.yaml", text)
    with pytest.raises(FluxError, match=says) as error:
        Folders(base, extra_config=[config])
    assert str(config) in str(error.value)


def test_annotated_names(base):
    folders = Folders(base)
    folders.create()
    assert folders.annotated("a.png") == folders.input / "a.png"
    assert folders.annotated("sub/a.png [output]") == folders.output / "sub" / "a.png"
    assert folders.annotated("a.png[temp]") == folders.temp / "a.png"
    assert folders.annotated("a [1].png") == folders.input / "a [1].png"
    for wrong in ("../a.png", "/a.png [output]", "..\\a.png", "x/../../a.png [temp]"):
        with pytest.raises(PathError):
            folders.annotated(wrong)
    with pytest.raises(PathError):
        folders.annotated(5)
    folders.close()


def test_an_output_that_cannot_be_written_is_told_before_anything_runs(base, tmp_path, monkeypatch):
    folders, pictures = Folders(base, output=tmp_path / "pictures"), tmp_path / "pictures"
    folders.create()
    monkeypatch.setattr("fluxcanvas.web.host.folders.os.access", lambda path, mode: path != pictures)
    with pytest.raises(FluxError, match=r"pictures cannot be written to.*--output"):
        folders.create()


def test_the_temporary_folder_goes_with_the_process(base):
    folders = Folders(base)
    temp = folders.temp
    put(temp / "a.png")
    folders.close()
    assert not temp.exists()


def test_contained_resolves_links_before_it_judges(tmp_path):
    root = tmp_path / "root"
    put(tmp_path / "secret")
    put(root / "inside" / "file")
    (root / "out").symlink_to(tmp_path)
    (root / "in").symlink_to(root / "inside")
    (tmp_path / "rooted").mkdir()
    assert contained(root, "in/file") == root / "inside" / "file"
    assert contained(root, "", "inside", "file") == root / "inside" / "file"
    with pytest.raises(PathError, match="link"):
        contained(root, "out", "secret")
    (root / "sibling").symlink_to(tmp_path / "rooted")  # its path begins with the root's
    with pytest.raises(PathError):
        contained(root, "sibling")


@pytest.mark.parametrize(
    "part",
    ["..", "a/..", "/a", "a\\b", "C:a", "c:/a", "a\0", "a\nb", "a\x7f", "\ud800", "x" * 256, "a/" * 2000, None, 5],
)
def test_parts_that_are_no_plain_names(part):
    with pytest.raises(PathError):
        relative("ok", part)


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "w.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskFull, match=r"No space is left.*w\.json was not saved"):
        write_atomic(path, b"three")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_of_two_writers_one_gets_a_new_name(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def write(number: int) -> bool:
        try:
            write_atomic(tmp_path / "w.json", bytes([number]) * 1000, overwrite=False)
        except files.Taken:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(8))) == 1
    assert len(set((tmp_path / "w.json").read_bytes())) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_write_to_a_wrong_place_is_told(tmp_path):
    put(tmp_path / "file")
    with pytest.raises(FluxError, match=r"w\.json could not be written"):
        write_atomic(tmp_path / "file" / "w.json", b"x")
