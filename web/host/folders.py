"""The folders of the host: models by category, input, output, temp, user, custom_nodes."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from ...flux_runtime.errors import FluxError
from ...nodes.host import find_model, list_models
from .files import PathError, contained, relative
from .model_paths import CATEGORIES, category_name, read_extra_paths
from .options import HostOptions

CHECKOUT = Path(__file__).resolve().parents[2]
_ELSEWHERE = "Choose another place: --base-directory for everything, --output for the pictures."


def base_directory(explicit: Path | None = None) -> Path:
    """Where models, input, output and user lie: the given folder, $FLUXCANVAS_HOME, the checkout or ~/fluxcanvas."""
    if explicit is not None:
        return Path(explicit).expanduser().resolve()
    home = os.environ.get("FLUXCANVAS_HOME")
    if home:
        return Path(home).expanduser().resolve()
    if (CHECKOUT / "fluxcanvas").is_file():  # the start script lies only in a checkout, not in an installed package
        return CHECKOUT
    return Path.home() / "fluxcanvas"


class Folders:
    """Finds model files and user files. Nothing is written until `create`."""

    def __init__(
        self,
        base: Path | None = None,
        models: Iterable[Path] = (),
        output: Path | None = None,
        extra_config: Iterable[Path] = (),
    ) -> None:
        """`models` are further roots, `extra_config` files like extra_model_paths.yaml; FluxError names a bad one."""
        self.base = base_directory(base)
        self.input = self.base / "input"
        self.output = Path(output).expanduser().resolve() if output else self.base / "output"
        self.user = self.base / "user"
        self._temp: Path | None = None
        self._making_temp = threading.Lock()
        self.custom_nodes = [self.base / "custom_nodes"]
        self._roots: dict[str, list[Path]] = {name: [] for name in CATEGORIES}
        for root in (*models, self.base / "models"):
            self._add_root(Path(root).expanduser().resolve())
        own = self.base / "extra_model_paths.yaml"
        for config in (*([own] if own.is_file() else []), *extra_config):
            self._add_config(Path(config).expanduser())

    @classmethod
    def from_options(cls, options: HostOptions) -> Folders:
        """The folders that the options name; FluxError when a given model folder does not exist."""
        for root in options.models:
            if not Path(root).expanduser().is_dir():
                raise FluxError(f"The model folder {root} does not exist; give --models a folder that does.")
        return cls(options.base_directory, options.models, options.output, options.extra_model_paths_config)

    def _add_root(self, root: Path) -> None:
        for category, names in CATEGORIES.items():
            self._roots[category] += [root / name for name in names if root / name not in self._roots[category]]

    def _add_config(self, config: Path) -> None:
        for category, folder, is_default in read_extra_paths(config):
            roots = self.custom_nodes if category == "custom_nodes" else self._roots.setdefault(category, [])
            if folder in roots:
                roots.remove(folder)
            roots.insert(0 if is_default else len(roots), folder)

    def create(self) -> None:
        """Make the folders that the host writes to; FluxError when the disk does not let it, before anything is run."""
        try:
            for folder in (
                self.input,
                self.output,
                *(self.user / "default" / name for name in ("workflows", "subgraphs")),
            ):
                folder.mkdir(parents=True, exist_ok=True)
            for names in CATEGORIES.values():
                (self.base / "models" / names[0]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FluxError(f"The folder {error.filename} cannot be made: {error.strerror}. {_ELSEWHERE}") from error
        for folder in (self.output, self.user):
            if not os.access(folder, os.W_OK):
                raise FluxError(f"The folder {folder} cannot be written to. {_ELSEWHERE}")

    @property
    def temp(self) -> Path:
        """A folder of this process alone for previews, made on first use and removed by `close`."""
        with self._making_temp:  # asked for by the thread that runs the nodes and by that which serves pictures
            if self._temp is None:
                self._temp = Path(tempfile.mkdtemp(prefix="fluxcanvas-")).resolve()
            return self._temp

    def close(self) -> None:
        """Remove the temporary pictures."""
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)
            self._temp = None

    def directory(self, kind: str) -> Path:
        """The folder of an "input", "output" or "temp" file; PathError for another kind."""
        if kind not in ("input", "output", "temp"):
            raise PathError(f"The type {kind[:40]!r} is unknown; it is input, output or temp.")
        return getattr(self, kind)

    def annotated(self, name: str, default: str = "input") -> Path:
        """The real path of a name as widgets hold it: `sub/a.png` or `sub/a.png [output]`; it need not exist."""
        if not isinstance(name, str):
            raise PathError(f"A file name must be text, not {type(name).__name__}.")
        for kind in ("input", "output", "temp"):
            if name.endswith(f"[{kind}]"):
                return contained(self.directory(kind), name[: -len(kind) - 2].rstrip())
        return contained(self.directory(default), name)

    def categories(self) -> dict[str, list[Path]]:
        """Every model category with its folders, those that do not exist included."""
        return {name: list(roots) for name, roots in self._roots.items()}

    def roots(self, category: str) -> list[Path]:
        """The folders of a category, in order of search; FluxError for an unknown category."""
        roots = self._roots.get(category_name(category))
        if roots is None:
            raise FluxError(f"There is no model category {category[:60]!r}; known are {', '.join(self._roots)}.")
        return list(roots)

    def list(self, category: str) -> list[str]:
        """Sorted names, relative to the category's folders with '/' between, of the models in it."""
        return list_models(self.roots(category), category_name(category))

    def resolve(self, category: str, name: str) -> Path:
        """The file (or folder) of a listed name; FluxError naming it and the folders searched.

        Links inside the model folders are followed, because people keep weights on other disks; the name itself
        cannot lead out.
        """
        return find_model(self.roots(category), category_name(category), relative(name))
