"""Models from Hugging Face: only the files that are read, with progress, and refusals that say what to do."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FluxError
from .files import WEIGHT_ENDINGS, LazyTensor, Stored
from .header import DTYPE_BITS

Progress = Callable[[str, float], None]

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_FOLDERS = ("transformer", "text_encoder", "text_encoder_2", "vae")
TEXT_FOLDERS = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
_PLAIN = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.safetensors\.index)?\.(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|json)"
)


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a model needs, with their sizes in bytes; `single` names a lone checkpoint."""

    repo: str
    sizes: Mapping[str, int]
    single: str = ""

    @property
    def weights(self) -> list[str]:
        return [name for name in self.sizes if name.endswith(WEIGHT_ENDINGS)]


def split_source(source: str) -> tuple[str, str] | None:
    """`owner/name` or `owner/name/file.safetensors` (or .gguf) -> repo id and file; None when it is neither."""
    parts = source.strip().split("/", 2)
    repo = "/".join(parts[:2])
    if len(parts) < 2 or not REPO_ID.fullmatch(repo) or repo.endswith((*WEIGHT_ENDINGS, ".json")):
        return None
    file = parts[2] if len(parts) == 3 else ""
    plain = file.endswith(WEIGHT_ENDINGS) and ".." not in file.split("/")
    return (repo, file) if plain or not file else None


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn the hub's and the network's errors into sentences; everything else (an interruption) passes."""
    import huggingface_hub.errors as hub

    network: tuple[type[Exception], ...] = (hub.HfHubHTTPError, hub.HFValidationError, OSError)
    try:
        import httpx

        network += (httpx.HTTPError,)
    except ImportError:  # huggingface_hub before 1.0 speaks through requests, whose errors are OSErrors
        pass
    try:
        yield
    except FluxError:
        raise
    except network as error:
        raise FluxError(_sentence(error, repo, hub)) from error


def _sentence(error: Exception, repo: str, hub: Any) -> str:
    if isinstance(error, hub.GatedRepoError):
        return (
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then log in on this machine with "
            "`hf auth login` (or set the environment variable HF_TOKEN) and try again"
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"Hugging Face has no public repository {repo}; check the spelling at https://huggingface.co/{repo}, "
            "and log in with `hf auth login` if it is a private one"
        )
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return f"{repo} lacks a file that a FLUX.1 model needs ({str(error).strip().splitlines()[0][:160]})"
    if isinstance(error, hub.HFValidationError):
        return f"{repo} is not the name of a Hugging Face repository (owner/name)"
    if isinstance(error, OSError) and error.errno == 28:
        return f"no disk space is left for {repo}; free some, or set HF_HOME to a folder on a larger disk"
    return (
        f"{repo} could not be reached on Hugging Face ({type(error).__name__}) and is not in the download cache; "
        "check the network, or name a local file or folder"
    )


def fetch_model(
    repo: str, file: str = "", progress: Progress | None = None, folders: Sequence[str] = WEIGHT_FOLDERS
) -> Path:
    """Download what is missing of a model: a folder in diffusers layout (of it, `folders`), or a file.

    Offline, the cache serves.
    """
    import huggingface_hub

    try:
        listing = list_repo(repo, file, folders)
    except FluxError:  # offline, or no longer allowed: what is already here may do
        cached = _cached(repo, file)
        if cached is None:
            raise
        return cached
    check_space(listing, Path(huggingface_hub.constants.HF_HUB_CACHE))
    with explained(repo):
        first = _download(listing, progress)
    return first if listing.single else first.parent


def _cached(repo: str, file: str) -> Path | None:
    """A model that an earlier download left whole."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, local_files_only=True))
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    return folder if whole else next(iter(sorted(folder.glob("*.safetensors"))), None)


def list_repo(repo: str, file: str = "", folders: Sequence[str] = WEIGHT_FOLDERS) -> Listing:
    """Ask the hub which files there are and choose those that are read."""
    import huggingface_hub

    with explained(repo):
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if file:
        if file not in sizes:
            raise FluxError(f"{repo} has no file {file}; see https://huggingface.co/{repo}/tree/main")
        return Listing(repo, {file: sizes[file]}, file)
    names = choose(list(sizes), folders)
    if names:
        return Listing(repo, {name: sizes[name] for name in names})
    lone = [name for name in sizes if name.endswith(WEIGHT_ENDINGS) and "/" not in name]
    if len(lone) == 1:
        return Listing(repo, {lone[0]: sizes[lone[0]]}, lone[0])
    choice = f"; name one of its files: {', '.join(f'{repo}/{name}' for name in lone[:6])}" if lone else ""
    raise FluxError(f"{repo} holds no model in diffusers layout{choice}")


def choose(names: Sequence[str], folders: Sequence[str] = WEIGHT_FOLDERS) -> list[str]:
    """The files of a diffusers repository that are loaded: configs, tokenizers, each component's weights once."""
    if "model_index.json" not in names:
        return _choose_component([name for name in names if "/" not in name])
    chosen = ["model_index.json"]
    for folder in folders:
        own = [name for name in names if name.startswith(folder + "/") and name.count("/") == 1]
        chosen += [name for name in own if name.endswith("/config.json")]
        chosen += _one_set([name for name in own if name.endswith((".safetensors", ".json"))])
    wanted = (".json", ".txt", ".model")
    return chosen + [n for n in names if n.startswith(tuple(f + "/" for f in TEXT_FOLDERS)) and n.endswith(wanted)]


def _choose_component(names: list[str]) -> list[str]:
    """The repository of a single component (a ControlNet, an image encoder) has it at the top, beside its config."""
    weights = _one_set([name for name in names if name.endswith((".safetensors", ".json"))])
    if "config.json" not in names or not weights:
        return []
    return ["config.json", *(name for name in names if name == "preprocessor_config.json"), *weights]


def _one_set(names: list[str]) -> list[str]:
    """The plain weights of a component, or where there are none one variant of them."""
    plain = [name for name in names if _PLAIN.fullmatch(name.split("/")[-1])]
    if any(name.endswith(".safetensors") for name in plain):
        return plain
    marks = {name: m.group(1) for name in names if (m := _VARIANT.fullmatch(name.split("/")[-1]))}
    first = min(marks.values(), default="")
    return [name for name, mark in marks.items() if mark == first]


def check_space(listing: Listing, cache: Path) -> None:
    """Refuse before the download what the disk cannot hold."""
    place = next((p for p in (cache, *cache.parents) if p.exists()), Path.cwd())
    needed, free = sum(listing.sizes.values()), shutil.disk_usage(place).free
    have = sum(
        f.stat().st_size
        for f in (cache / f"models--{listing.repo.replace('/', '--')}" / "blobs").glob("*")
        if f.is_file()
    )
    if needed - have > free:
        raise FluxError(
            f"{listing.repo} takes {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB left; "
            "free some space, or set HF_HOME to a folder on a larger disk"
        )


def _download(listing: Listing, progress: Progress | None) -> Path:
    """Fetch every file; the local path of the first, which lies at the top of the repository."""
    import huggingface_hub

    total, done, paths = max(sum(listing.sizes.values()), 1), 0, []

    def tell(part: float) -> None:
        if progress:
            progress(f"downloading {listing.repo}", min((done + part) / total, 1.0))

    extra = "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters
    for name, size in listing.sizes.items():
        tell(0)
        bar = {"tqdm_class": _counting_bar(lambda part, size=size: tell(min(part, size)))} if extra else {}
        paths.append(Path(huggingface_hub.hf_hub_download(listing.repo, name, **bar)))
        done += size
    tell(0)
    return paths[0]


def _counting_bar(tell: Callable[[float], None]) -> type:
    """A progress bar class that draws nothing and passes on the bytes of one file."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = True
            super().__init__(*args, **options)
            self.bytes = float(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.bytes += n or 0
            tell(self.bytes)

    return Bar


def fetch_files(repo: str, names: Sequence[str]) -> Path:
    """Small files of a repository, those that it has; the folder they lie in."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found: Path | None = None
    with explained(repo):
        for name in names:
            try:
                found = Path(huggingface_hub.hf_hub_download(repo, name))
            except LocalEntryNotFoundError:  # offline and not in the cache: maybe the repository has no such file
                continue
            except EntryNotFoundError:
                continue
    if found is None:
        raise FluxError(f"{repo} could not be reached on Hugging Face and is not in the download cache")
    return found.parent


def remote_tensors(repo: str, name: str) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Names, shapes and types in a file of a repository, from its header; nothing else is downloaded."""
    import huggingface_hub

    if name.endswith(".gguf"):
        raise FluxError(f"{repo}/{name} is a GGUF file, which is described from a local copy alone; download it first")
    with explained(repo):
        header = huggingface_hub.HfApi().parse_safetensors_file_metadata(repo, name)
    known = {n: t for n, t in header.tensors.items() if t.dtype in DTYPE_BITS}
    tensors = {n: LazyTensor.whole(Stored(n, t.dtype, tuple(t.shape))) for n, t in known.items()}
    return tensors, {k: v for k, v in (header.metadata or {}).items() if isinstance(v, str)}


def remote_json(repo: str, name: str) -> Path:
    """A small file of a repository, in the download cache."""
    import huggingface_hub

    with explained(repo):
        return Path(huggingface_hub.hf_hub_download(repo, name))
