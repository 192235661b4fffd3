"""What ``load`` can open, brought to one form: a table with its target, or an array with its targets."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from pomona.data.images import SUFFIXES, read_images
from pomona.data.tables import missing_file, plain_frame, read_table
from pomona.data.target import find_target
from pomona.errors import PomonaError, unknown

Progress = Callable[[str], None]


@dataclass
class Source:
    """Rows with their targets, before anything is fitted.

    Attributes:
        name: a short name.
        origin: where the rows came from, for the card.
        kind: ``table``, ``image`` or ``series``.
        inputs: a frame (index 0, 1, ...) without the target, or an array (n, channels, ...).
        target: one column, or several columns of numbers.
        folder: where relative paths of images start.
        test: rows that the source itself sets apart for testing.
        notes: remarks for the card.
        synthetic: whether the data are generated.
    """

    name: str
    origin: str
    kind: Literal["table", "image", "series"]
    inputs: pd.DataFrame | np.ndarray
    target: pd.DataFrame
    folder: Path = Path()
    test: Source | None = None
    notes: list[str] = field(default_factory=list)
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: np.ndarray) -> Any:
        """Inputs of the rows at these positions."""
        return self.inputs.iloc[rows] if isinstance(self.inputs, pd.DataFrame) else self.inputs[rows]

    def column(self, name: str) -> pd.Series:
        """A column of a table's inputs."""
        assert isinstance(self.inputs, pd.DataFrame)
        return self.inputs[name]

    def keep(self, rows: np.ndarray) -> Source:
        """The source with these rows alone; row numbers of a table stay those of the file."""
        changed = {**self.__dict__, "inputs": self.take(rows), "target": self.target.iloc[rows]}
        return Source(**changed)


def open_source(
    source: Any,
    target: str | Sequence[str] | None = None,
    *,
    image_size: int = 32,
    progress: Progress | None = None,
) -> Source:
    """Open a file, folder, frame, pair of arrays or Bunch.

    Raises:
        PomonaError: for anything else, or if it cannot be read.
    """
    if isinstance(source, (str, Path)):
        return _from_path(Path(source), target, image_size, progress)
    if isinstance(source, pd.DataFrame):
        return from_frame(source, target, "data", "a DataFrame")
    if isinstance(source, Mapping):
        return retarget(_from_mapping(source), target)
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return retarget(from_arrays(source[0], source[1], "data", "arrays"), target)
    raise PomonaError(
        f"a source of type {type(source).__name__} cannot be loaded; give a built-in name, a file, a folder of "
        "images, a DataFrame, a pair (X, y) or a scikit-learn Bunch"
    )


def _from_path(path: Path, target: str | Sequence[str] | None, image_size: int, progress: Progress | None) -> Source:
    if path.is_dir():
        return image_folder(path, image_size, progress)
    if progress is not None:
        progress(f"reading {path.name}")
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    frame, notes = read_table(path)
    opened = from_frame(frame, target, path.name.split(".")[0], path.name, notes)
    opened.folder = path.parent
    return opened


def _from_npz(path: Path) -> Source:
    if not path.is_file():
        raise missing_file(path, [item.name for item in path.parent.glob("*.npz")])
    if not zipfile.is_zipfile(path):
        raise PomonaError(f"file {path.name!r} is not an npz file; write it with numpy.savez")
    with np.load(path, allow_pickle=False) as arrays:
        by_lower = {name.lower(): name for name in arrays.files}
        if not {"x", "y"} <= set(by_lower):
            raise PomonaError(
                f"file {path.name!r} needs arrays called X and y; it has {', '.join(arrays.files) or 'none'}"
            )
        try:
            x, y = arrays[by_lower["x"]], arrays[by_lower["y"]]
        except ValueError as error:
            raise PomonaError(
                f"file {path.name!r} holds Python objects; save X and y as arrays of numbers or fixed-length strings"
            ) from error
    return from_arrays(x, y, path.stem, path.name)


def _from_mapping(source: Mapping[str, Any]) -> Source:
    """A scikit-learn Bunch (``frame`` or ``data`` and ``target``) or a mapping with ``X`` and ``y``."""
    bunch = {str(key).lower(): value for key, value in source.items()}
    x, y = bunch.get("data", bunch.get("x")), bunch.get("target", bunch.get("y"))
    if x is None or y is None:
        raise PomonaError(f"a mapping needs X and y, or data and target; it has {', '.join(source) or 'nothing'}")
    names = bunch.get("feature_names")
    if not isinstance(x, pd.DataFrame) and names is not None and np.ndim(x) == 2 and len(names) == np.shape(x)[1]:
        x = pd.DataFrame(_numpy(x), columns=list(names))
    labels = bunch.get("target_names")
    y = _numpy(y) if not isinstance(y, (pd.Series, pd.DataFrame)) else y
    whole = isinstance(y, np.ndarray) and y.ndim == 1 and y.dtype.kind in "iu"
    if whole and labels is not None and len(labels) > 1 and len(y) and y.min() >= 0 and y.max() < len(labels):
        y = np.asarray(labels, dtype=object)[y]
    return from_arrays(x, y, "data", "a Bunch" if "data" in bunch else "a mapping")


def from_frame(
    frame: pd.DataFrame,
    target: str | Sequence[str] | None,
    name: str,
    origin: str,
    notes: Sequence[str] = (),
) -> Source:
    """A table that holds its target."""
    plain, more = plain_frame(frame)
    wanted = [target] if target is None or isinstance(target, str) else target
    targets = [find_target(list(plain.columns), one) for one in wanted]
    inputs = plain.drop(columns=targets)
    if target is None:
        more.append(f"no target was named; {targets[0]!r} was taken for its name")
    return Source(name, origin, "table", inputs, plain[targets], notes=[*notes, *more])


def retarget(source: Source, target: str | Sequence[str] | None) -> Source:
    """The same rows with another target, if one is named that the source does not have by itself."""
    names = list(source.target.columns)
    wanted = [target] if isinstance(target, str) else list(target or names)
    if wanted == names:
        return source
    if not isinstance(source.inputs, pd.DataFrame):
        raise unknown("target", wanted[0], names)
    frame = pd.concat([source.inputs, source.target], axis=1)
    return from_frame(frame, wanted, source.name, source.origin, source.notes)


def from_arrays(x: Any, y: Any, name: str, origin: str) -> Source:
    """Inputs (n, features), (n, channels, length) or (n, channels, height, width) with targets (n,) or (n, size).

    Raises:
        PomonaError: for other shapes, or lengths that differ.
    """
    targets = _target_frame(y)
    array = x if isinstance(x, pd.DataFrame) else _numpy(x)
    if len(array) != len(targets):
        raise PomonaError(f"X has {len(array):,} rows and y {len(targets):,}; they must be equally many")
    if isinstance(array, pd.DataFrame) or array.ndim == 2:
        frame = array if isinstance(array, pd.DataFrame) else pd.DataFrame(array).add_prefix("x")
        inputs, notes = plain_frame(frame)
        return Source(name, origin, "table", inputs, targets, notes=notes)
    if array.ndim not in (3, 4) or array.dtype.kind not in "iufb":
        raise PomonaError(
            f"X of shape {array.shape} and type {array.dtype} cannot be used; needed are numbers of shape "
            "(n, features), (n, channels, length) or (n, channels, height, width)"
        )
    if array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        raise PomonaError(f"X of shape {array.shape} has its channels last; move them: np.moveaxis(X, -1, 1)")
    return Source(name, origin, "series" if array.ndim == 3 else "image", array, targets)


def _target_frame(y: Any) -> pd.DataFrame:
    if isinstance(y, pd.Series):
        y = y.to_frame(y.name if y.name is not None else "target")
    if not isinstance(y, pd.DataFrame):
        values = _numpy(y)
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if values.ndim not in (1, 2):
            raise PomonaError(f"y of shape {values.shape} cannot be used; needed is (n,) or (n, size)")
        y = pd.DataFrame(values)
        y.columns = ["target"] if values.ndim == 1 else [f"target_{i}" for i in range(values.shape[1])]
    return plain_frame(y)[0]


def _numpy(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if hasattr(values, "toarray"):  # a scipy sparse matrix
        return values.toarray()
    return np.asarray(values)


def image_folder(path: Path, image_size: int, progress: Progress | None = None) -> Source:
    """A folder with one subfolder of images a class; or ``train`` and ``test`` folders of such.

    Raises:
        PomonaError: if it holds no such subfolders, or an image cannot be read.
    """
    if (path / "train").is_dir() and (path / "test").is_dir():
        opened = image_folder(path / "train", image_size, progress)
        opened.test = image_folder(path / "test", image_size, progress)
        opened.name, opened.origin = path.name, f"{path.name}/train and {path.name}/test"
        return opened
    folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    files = [(item, folder.name) for folder in folders for item in sorted(folder.rglob("*"))]
    files = [(item, label) for item, label in files if item.suffix.lower() in SUFFIXES]
    if not files:
        raise PomonaError(f"folder {path.name!r} holds no images; needed is one subfolder of images a class")
    pixels = read_images([item for item, _ in files], image_size, progress=progress)
    target = pd.DataFrame({"class": [label for _, label in files]})
    notes = [f"images are read at {image_size} x {image_size} pixels, {pixels.shape[1]} channel(s)"]
    return Source(path.name, path.name, "image", pixels, target, notes=notes)
