"""Data sets: scikit-learn's digits (offline), MNIST and CIFAR-10 (fetched), any ``FILE.npz``."""

from __future__ import annotations

import hashlib
import http.client
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from experiments.errors import (
    DataFormatError,
    DataUnavailableError,
    MissingDependencyError,
    UnknownNameError,
    near_names,
)

NAMES = ("digits", "mnist", "cifar10")

# name and version at OpenML, shape of an image, how many samples at the end are for testing
_OPENML: dict[str, tuple[str, int, tuple[int, ...], int]] = {
    "mnist": ("mnist_784", 1, (28, 28), 10_000),
    "cifar10": ("CIFAR_10", 1, (3, 32, 32), 10_000),
}
_IMAGE_KEYS = ("x", "X", "images", "data")
_LABEL_KEYS = ("y", "labels", "targets", "target")
_OFFLINE = (
    "Offline use --data digits, or --data FILE.npz with arrays x (samples first) and y (labels)."
)


# Images and labels to train on, and to test on.
Parts = tuple[
    NDArray[np.floating[Any]], NDArray[np.int64], NDArray[np.floating[Any]], NDArray[np.int64]
]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels.

    Parameters
    ----------
    name : str
        What it is called in figures and verdicts; never a path.
    images : ndarray, shape (m, ...)
        Float64 in [0, 1] unless the file holds values that were scaled in another way.
    labels : ndarray, shape (m,)
        Int64, from 0.
    num_classes : int
        One more than the largest label.
    fingerprint : str
        SHA-256 of the content, test samples included.
    test_images, test_labels : ndarray or None
        Samples held out, where the data set defines them.
    """

    name: str
    images: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]
    num_classes: int
    fingerprint: str
    test_images: NDArray[np.floating[Any]] | None = None
    test_labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return (
            f"Dataset({self.name!r}, {len(self)} samples of {shape}, "
            f"{self.num_classes} classes, {self.fingerprint[:12]})"
        )

    def split(self, test_share: float = 0.2) -> Parts:
        """Images and labels to train on, and to test on.

        Where the data set defines no test samples, ``test_share`` of it is held out, always the
        same.
        """
        if self.test_images is not None and self.test_labels is not None:
            return self.images, self.labels, self.test_images, self.test_labels
        order = np.random.default_rng(0).permutation(len(self))
        held, kept = np.split(order, [round(test_share * len(self))])
        return self.images[kept], self.labels[kept], self.images[held], self.labels[held]


def spread_out(available: int, wanted: int | None) -> NDArray[np.int64]:
    """Indices of so many samples at equal distances, all for None: files may be sorted."""
    if wanted is None or wanted >= available:
        return np.arange(available)
    return np.linspace(0, available - 1, wanted).round().astype(np.int64)


def check_name(name_or_path: str) -> None:
    """Reject, before anything is loaded, what cannot be a data set."""
    if name_or_path in NAMES:
        return
    path = Path(name_or_path)
    if path.suffix == ".npz":
        if not path.is_file():
            msg = f"data file {name_or_path!r} does not exist"
            raise UnknownNameError(msg)
        return
    hint = near_names(name_or_path, [*NAMES, "FILE.npz"])
    msg = f"unknown data set {name_or_path!r}: {hint}\n{_OFFLINE}"
    raise UnknownNameError(msg)


def load(name_or_path: str, *, dtype: DTypeLike = np.float64, timeout: float = 60.0) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    name_or_path : str
        ``"digits"`` (1797 images of 8×8, comes with scikit-learn), ``"mnist"`` or ``"cifar10"``
        (fetched from OpenML once, then cached by scikit-learn), or the path of an ``.npz`` file.
        A file holds images as ``x``, ``X``, ``images`` or ``data`` and labels as ``y``,
        ``labels``, ``targets`` or ``target``, or both with ``_train`` and optionally ``_test``
        appended; labels are integers from 0, words, or one-hot rows.
    dtype : dtype
        Of the images. CIFAR-10 takes 1.5 GB in float64.
    timeout : float
        Seconds that the network may be silent before fetching is given up.

    Returns
    -------
    Dataset
        Images that are uint8, or reach from 0 to beyond 1 but not beyond 255, are divided by 255;
        digits by 16.

    Raises
    ------
    UnknownNameError
        There is no such data set or file.
    DataFormatError
        The file does not hold what is needed; the text lists what it does hold.
    DataUnavailableError
        The data set could not be fetched; the text says what works offline.
    MissingDependencyError
        scikit-learn is not installed.
    """
    check_name(name_or_path)
    if name_or_path == "digits":
        bunch = _sklearn_datasets().load_digits()
        images = np.asarray(bunch.images, dtype=dtype) / 16
        return _dataset("digits", images, bunch.target)
    if name_or_path in _OPENML:
        return _fetch(name_or_path, dtype, timeout)
    return _load_npz(Path(name_or_path), dtype)


def _sklearn_datasets() -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        msg = (
            "this data set comes with scikit-learn, which is not installed: "
            "pip install conditioning[experiments], or use --data FILE.npz"
        )
        raise MissingDependencyError(msg) from error
    return sklearn.datasets


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(former)


def _fetch(name: str, dtype: DTypeLike, timeout: float) -> Dataset:
    openml_name, version, shape, num_test = _OPENML[name]
    fetch_openml = _sklearn_datasets().fetch_openml
    try:
        with _socket_timeout(timeout):
            bunch = fetch_openml(
                openml_name, version=version, as_frame=False, parser="auto", n_retries=1
            )
    # URLError, HTTPError and time-outs are OSErrors; OpenML's own refusals are ValueErrors; a
    # connection that breaks off is an HTTPException.
    except (OSError, ValueError, http.client.HTTPException) as error:
        msg = f"could not fetch {name} from OpenML ({type(error).__name__}: {error}). {_OFFLINE}"
        raise DataUnavailableError(msg) from error
    images, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    if images.ndim != 2 or images.shape[1] != np.prod(shape):
        msg = f"OpenML's {openml_name} has shape {images.shape}, expected (m, {np.prod(shape)})"
        raise DataFormatError(msg)
    images = images.reshape(-1, *shape)
    images = _scaled(images, _scale(images, name), dtype, name)
    # OpenML states no split for either; the last samples are the customary test set.
    return _dataset(
        name, images[:-num_test], labels[:-num_test], images[-num_test:], labels[-num_test:]
    )


def _load_npz(path: Path, dtype: DTypeLike) -> Dataset:
    try:
        # Never allow pickles: a data file must not be able to run code. Opened here, because numpy
        # does not close a file that turns out to be no archive.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            keys = sorted(file.files)
            names = {
                part: _find(path, keys, part)
                for part in ("", "_train", "_test")
                if any(f"{key}{part}" in keys for key in _IMAGE_KEYS)
            }
            train = names.get("_train") or names.get("")
            if train is None:
                _find(path, keys, "")
            arrays = {part: tuple(file[key] for key in pair) for part, pair in names.items()}
    except DataFormatError:
        raise
    # A single array under another name is no context manager, which is a TypeError or, before
    # Python 3.11, an AttributeError.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        msg = f"{path.name} cannot be read as .npz without pickled objects ({error})"
        raise DataFormatError(msg) from error
    images, labels = arrays["_train"] if "_train" in arrays else arrays[""]
    test: tuple[NDArray[Any], ...] = arrays.get("_test", ())
    # The training images decide for both: a test set need not reach the largest value.
    scale = _scale(images, path.name)
    scaled = [_scaled(array, scale, dtype, path.name) for array in (images, *test[:1])]
    return _dataset(path.stem, scaled[0], labels, *scaled[1:], *test[1:])


def _find(path: Path, keys: list[str], part: str) -> tuple[str, str]:
    found = [
        next((f"{key}{part}" for key in wanted if f"{key}{part}" in keys), None)
        for wanted in (_IMAGE_KEYS, _LABEL_KEYS)
    ]
    if found[0] is None or found[1] is None:
        missing = "images" if found[0] is None else "labels"
        wanted = _IMAGE_KEYS if found[0] is None else _LABEL_KEYS
        msg = (
            f"{path.name} holds {', '.join(keys) or 'nothing'}, but no {missing}: "
            f"expected {' or '.join(f'{key}{part}' for key in wanted)} "
            "(or the same with _train and _test appended)"
        )
        raise DataFormatError(msg)
    return found[0], found[1]


def _scale(images: NDArray[Any], name: str) -> float:
    """Check images, and say what they are to be divided by."""
    if images.dtype.kind not in "uifb":
        msg = f"images of {name} must be real numbers, got dtype {images.dtype}"
        raise DataFormatError(msg)
    if images.ndim < 2 or images.size == 0:
        msg = f"images of {name} need shape (samples, ...) with samples, got {images.shape}"
        raise DataFormatError(msg)
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        msg = f"images of {name} contain NaN or infinities"
        raise DataFormatError(msg)
    return 255.0 if images.dtype == np.uint8 or (low >= 0 and 1 < high <= 255) else 1.0


def _scaled(images: NDArray[Any], scale: float, dtype: DTypeLike, name: str) -> NDArray[Any]:
    _scale(images, name)
    return np.asarray(images.astype(dtype) / np.asarray(scale, dtype=dtype))


def _labels(labels: ArrayLike, name: str) -> NDArray[np.int64]:
    labels = np.asarray(labels)
    if labels.size == 0:
        msg = f"{name} holds no labels"
        raise DataFormatError(msg)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "uifb":
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()):
            msg = f"labels of {name} have shape {labels.shape} but their rows are not one-hot"
            raise DataFormatError(msg)
        return np.asarray(labels.argmax(axis=1), dtype=np.int64)
    if labels.ndim != 1:
        msg = f"labels of {name} need shape (samples,), got {labels.shape}"
        raise DataFormatError(msg)
    if labels.dtype.kind in "USO":
        words = [str(label) for label in labels]
        # OpenML gives digits as words: those keep their value, other words their order.
        if all(word.isdecimal() for word in words):
            return np.array([int(word) for word in words], dtype=np.int64)
        order = {word: index for index, word in enumerate(sorted(set(words)))}
        return np.array([order[word] for word in words], dtype=np.int64)
    if labels.dtype.kind not in "uifb" or (labels != np.floor(labels)).any() or labels.min() < 0:
        msg = f"labels of {name} must be integers from 0, words or one-hot rows"
        raise DataFormatError(msg)
    return labels.astype(np.int64)


def _dataset(
    name: str,
    images: NDArray[Any],
    labels: ArrayLike,
    test_images: NDArray[Any] | None = None,
    test_labels: ArrayLike | None = None,
) -> Dataset:
    checked = {"images": images, "labels": _labels(labels, name)}
    if test_images is not None and test_labels is not None:
        checked |= {"test_images": test_images, "test_labels": _labels(test_labels, name)}
    for part in ("", "test_"):
        if f"{part}images" in checked:
            counts = len(checked[f"{part}images"]), len(checked[f"{part}labels"])
            if counts[0] != counts[1]:
                msg = f"{name} has {counts[0]} {part}images but {counts[1]} {part}labels"
                raise DataFormatError(msg)
    largest = max(int(array.max()) for key, array in checked.items() if key.endswith("labels"))
    return Dataset(name, num_classes=largest + 1, fingerprint=_fingerprint(checked), **checked)


def _fingerprint(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.shape} {array.dtype.str} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
