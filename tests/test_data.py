"""Data sets, and the moments that a linear network sees."""

from __future__ import annotations

import dataclasses
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data
from experiments.data import Dataset, load, spread_out
from experiments.errors import (
    DataFormatError,
    DataUnavailableError,
    MissingDependencyError,
    UnknownNameError,
)
from experiments.moments import principal_moments, second_moments, virtual_samples

RNG = np.random.default_rng(0)


def save(tmp_path, name="mine.npz", **arrays):
    np.savez(tmp_path / name, **arrays)
    return str(tmp_path / name)


def images(m=12, size=(4, 4)):
    return RNG.integers(0, 256, (m, *size), dtype=np.uint8)


def labels(m=12, classes=3):
    return np.arange(m) % classes


def test_digits_are_there_without_a_network():
    dataset = load("digits")
    assert dataset.images.shape == (1797, 8, 8)
    assert (dataset.images.min(), dataset.images.max()) == (0, 1)
    assert dataset.images.dtype == np.float64
    assert dataset.labels.dtype == np.int64
    assert dataset.num_classes == 10
    assert dataset.test_images is None
    assert dataset.fingerprint == load("digits").fingerprint
    assert "1797 samples of 8×8" in repr(dataset)


@pytest.mark.parametrize(
    ("image_key", "label_key"),
    [("x", "y"), ("X", "labels"), ("images", "targets"), ("data", "target")],
)
def test_a_file_may_name_its_arrays_in_the_customary_ways(tmp_path, image_key, label_key):
    pixels = images()
    dataset = load(save(tmp_path, **{image_key: pixels, label_key: labels()}))
    assert np.array_equal(dataset.images, pixels / 255)
    assert np.array_equal(dataset.labels, labels())
    assert (dataset.name, dataset.num_classes) == ("mine", 3)


def test_a_file_with_a_split_keeps_it(tmp_path):
    train, test = images(), images(5)
    path = save(tmp_path, x_train=train, y_train=labels(), x_test=test, y_test=labels(5, 4))
    dataset = load(path)
    assert len(dataset) == 12
    assert np.array_equal(dataset.test_images, test / 255)
    assert dataset.num_classes == 4
    other = save(tmp_path, "o.npz", x_train=train, y_train=labels(), x_test=test, y_test=labels(5))
    assert load(other).fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("pixels", "divisor"),
    [
        (np.array([[0.0, 1.0], [0.5, 0.25]]), 1),
        (np.array([[0.0, 255.0], [0.5, 0.25]]), 255),
        (np.array([[0, 200], [1, 2]]), 255),
        (np.array([[-1.0, 2.0], [0.5, 0.25]]), 1),
        (np.array([[0, 1], [1, 0]], dtype=np.uint8), 255),
    ],
)
def test_bytes_are_scaled_and_scaled_values_are_left_alone(tmp_path, pixels, divisor):
    dataset = load(save(tmp_path, x=pixels, y=[0, 1]))
    assert np.array_equal(dataset.images, pixels / divisor)


def test_the_test_images_are_scaled_like_the_training_images(tmp_path):
    path = save(
        tmp_path, x_train=np.array([[0.0, 255.0]]), y_train=[0], x_test=[[0.0, 1.0]], y_test=[0]
    )
    assert load(path).test_images.max() == 1 / 255


@pytest.mark.parametrize(
    ("given_labels", "expected"),
    [
        (["7", "3", "7"], [7, 3, 7]),
        (["cat", "ant", "cat"], [1, 0, 1]),
        ([1.0, 0.0, 2.0], [1, 0, 2]),
        ([[0, 1], [1, 0], [0, 1]], [1, 0, 1]),
        ([[1], [0], [2]], [1, 0, 2]),
    ],
)
def test_labels_come_as_numbers_words_or_rows(tmp_path, given_labels, expected):
    assert load(save(tmp_path, x=images(3), y=given_labels)).labels.tolist() == expected


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": images(), "y": labels()}, "holds pixels, y, but no images: expected x or X"),
        ({"x": images(), "classes": labels()}, "holds classes, x, but no labels: expected y or"),
        ({"x_train": images(), "y": labels()}, "expected y_train or"),
        ({"x_test": images(), "y_test": labels()}, "but no images"),
        ({"x": images(), "y": labels(11)}, "12 images but 11 labels"),
        ({"x": images(), "y": labels() - 1}, "integers from 0"),
        ({"x": images(), "y": labels() + 0.5}, "integers from 0"),
        ({"x": images(), "y": np.ones((12, 3))}, "not one-hot"),
        ({"x": images(), "y": np.ones((12, 3, 2))}, "shape"),
        ({"x": np.full((2, 2), np.nan), "y": [0, 1]}, "NaN"),
        ({"x": np.array([["a"]]), "y": [0]}, "real numbers"),
        ({"x": np.ones((2, 2), dtype=complex), "y": [0, 1]}, "real numbers"),
        ({"x": np.zeros((0, 2)), "y": []}, "shape"),
        ({"x": images(), "y": []}, "no labels"),
        ({"x": np.array([{}], dtype=object), "y": [0]}, "pickled"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_it_holds(tmp_path, arrays, message):
    with pytest.raises(DataFormatError, match=message):
        load(save(tmp_path, **arrays))


def test_a_file_that_is_no_archive_is_said_to_be_none(tmp_path):
    broken = tmp_path / "broken.npz"
    for content in (b"", b"not a zip", b"PK\x03\x04 cut"):
        broken.write_bytes(content)
        with pytest.raises(DataFormatError, match="broken.npz"):
            load(str(broken))
    np.save(tmp_path / "one.npy", images())
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataFormatError, match="one.npz"):
        load(str(tmp_path / "one.npz"))


def test_an_unknown_name_gets_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(UnknownNameError, match="does not exist"):
        load("nowhere.npz")


def test_fetched_sets_are_split_shaped_and_scaled(monkeypatch):
    import sklearn.datasets

    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        size = 784 if name == "mnist_784" else 3072
        pixels = RNG.integers(0, 256, (9, size))
        return SimpleNamespace(data=pixels, target=np.array(list("012345678"), dtype=object))

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    short = {name: (*entry[:3], 3) for name, entry in data._OPENML.items()}
    monkeypatch.setattr(data, "_OPENML", short)
    for name, shape in (("mnist", (28, 28)), ("cifar10", (3, 32, 32))):
        dataset = load(name, dtype=np.float32)
        assert dataset.images.shape == (6, *shape)
        assert dataset.test_images.shape == (3, *shape)
        assert dataset.images.dtype == np.float32
        assert dataset.images.max() <= 1
        assert dataset.test_labels.tolist() == [6, 7, 8]
    assert asked[0][0] == "mnist_784"
    assert asked[0][1]["version"] == 1


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route"), TimeoutError("silent"), ValueError("not active")],
)
def test_a_failed_fetch_says_what_works_offline(monkeypatch, error):
    import socket

    import sklearn.datasets

    def fetch(name, **options):
        assert socket.getdefaulttimeout() == 3.0
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(DataUnavailableError, match="--data digits, or --data FILE.npz"):
        load("mnist", timeout=3.0)
    assert socket.getdefaulttimeout() is None


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install conditioning\[experiments\]"):
        load("digits")


def planted(m=200, size=6, classes=4, seed=0):
    """Samples with separated variances that depend on their class."""
    rng = np.random.default_rng(seed)
    members = rng.integers(0, classes, m)
    centers = rng.normal(size=(classes, size))
    spread = np.geomspace(1, 10, size)
    samples = (rng.normal(size=(m, size)) + centers[members]) * spread + 5
    return Dataset("planted", samples, members, classes, "0" * 64)


@pytest.mark.parametrize("center", [True, False])
def test_whitened_components_have_the_identity_as_second_moment(center):
    moments = principal_moments(planted(), 4, center=center)
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(moments.sigma_xx, identity, rtol=0, atol=1e-14)
    assert moments.whitened
    assert moments.inputs.shape == (200, 4)
    if center:
        assert float(moments.inputs.mean(dim=0).abs().max()) < 1e-14


def test_components_are_those_of_a_principal_component_analysis():
    from sklearn.decomposition import PCA

    dataset = planted()
    moments = principal_moments(dataset, 4, whiten=False)
    analysis = PCA(4).fit(dataset.images)
    rows = analysis.components_
    signs = np.sign(rows[np.arange(4), np.abs(rows).argmax(axis=1)])
    assert np.allclose(moments.inputs, analysis.transform(dataset.images) * signs)
    scale = (len(dataset) - 1) / len(dataset)
    assert np.allclose(moments.variances, analysis.explained_variance_ * scale)
    whitened = principal_moments(dataset, 4)
    assert np.allclose(whitened.inputs, moments.inputs / moments.variances.sqrt())


def test_the_conventions_for_order_and_sign_do_not_depend_on_the_samples_order():
    dataset = planted()
    order = np.random.default_rng(1).permutation(len(dataset))
    shuffled = Dataset("s", dataset.images[order], dataset.labels[order], 4, "1" * 64)
    expected, found = principal_moments(dataset, 4), principal_moments(shuffled, 4)
    assert torch.allclose(found.difference, expected.difference, atol=1e-12)
    assert torch.allclose(found.sigma_yy, expected.sigma_yy)


def test_the_minimum_loss_is_that_of_least_squares():
    moments = principal_moments(planted(), 4)
    solution = torch.linalg.lstsq(moments.inputs, moments.targets).solution.T
    residual = moments.targets - moments.inputs @ solution.T
    least = float((residual**2).sum() / (2 * len(moments.inputs)))
    assert moments.minimum_loss == pytest.approx(least, rel=1e-12)
    assert float(moments.loss(solution)) == pytest.approx(least, rel=1e-12)
    assert torch.allclose(moments.best_map, solution)


def test_other_signs_change_the_difference_but_not_the_minimum():
    moments = principal_moments(planted(), 4)
    flipped = moments.flipped((1, -1, 1, -1))
    assert torch.equal(flipped.sigma_xx, second_moments(flipped.inputs, flipped.targets)[0])
    assert torch.allclose(flipped.sigma_yx, second_moments(flipped.inputs, flipped.targets)[1])
    assert not torch.allclose(flipped.difference, moments.difference)
    assert flipped.minimum_loss == pytest.approx(moments.minimum_loss)
    with pytest.raises(DataFormatError, match="1 or -1"):
        moments.flipped((1, 1))


def test_what_cannot_be_reduced_says_so():
    with pytest.raises(DataFormatError, match=r"1\.\.\.6"):
        principal_moments(planted(), 7)
    dataset = planted(size=6)
    flat = Dataset("flat", dataset.images * [1, 1, 0, 0, 0, 0], dataset.labels, 4, "")
    with pytest.raises(DataFormatError, match="num_components <= 2"):
        principal_moments(flat, 4)
    assert principal_moments(flat, 4, whiten=False).variances[2:].abs().max() < 1e-12
    with pytest.raises(DataFormatError, match="as many components as classes"):
        _ = principal_moments(planted(), 3).difference


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_virtual_samples_have_the_same_moments(m, width, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(m, width, generator=generator, dtype=torch.float64)
    targets = torch.randn(m, classes, generator=generator, dtype=torch.float64)
    inputs[:, 0] = targets[:, 0]  # rank deficient
    few = virtual_samples(inputs, targets)
    assert few[0].shape == (min(m, width + classes), width)
    assert few[1].shape == (min(m, width + classes), classes)
    for found, expected in zip(second_moments(*few), second_moments(inputs, targets), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_linear_network_cannot_tell_virtual_samples_from_the_data():
    moments = principal_moments(load("digits"))
    few = virtual_samples(moments.inputs, moments.targets)
    assert few[0].shape == (20, 10)
    weights = [torch.randn(10, 10, dtype=torch.float64) for _ in range(3)]

    def loss(first, second, third, inputs, targets):
        outputs = inputs @ first.T @ second.T @ third.T
        return ((targets - outputs) ** 2).sum() / (2 * len(inputs))

    full = torch.func.hessian(loss)(*weights, moments.inputs, moments.targets)
    compressed = torch.func.hessian(loss)(*weights, *few)
    assert torch.allclose(compressed, full, rtol=1e-10, atol=1e-10 * float(full.abs().max()))


def test_whitened_digits_give_the_known_constants():
    moments = principal_moments(load("digits"))
    assert float(torch.linalg.cond(moments.difference)) == pytest.approx(1.678339, rel=1e-5)
    assert moments.minimum_loss == pytest.approx(0.276599, rel=1e-5)
    # Centred inputs are uncorrelated with the constant that one-hot rows sum to.
    assert int(torch.linalg.matrix_rank(moments.sigma_yx, rtol=1e-12)) == 9


def test_a_fifth_is_held_out_and_always_the_same():
    digits = load("digits")
    images, labels, test, test_labels = digits.split()
    assert len(test) == len(test_labels) == round(0.2 * len(digits))
    assert len(images) == len(labels) == len(digits) - len(test)
    rows = np.concatenate([images, test]).reshape(len(digits), -1)
    original = digits.images.reshape(len(digits), -1)
    assert np.array_equal(np.sort(rows, axis=0), np.sort(original, axis=0))
    assert np.array_equal(digits.split()[2], test)
    own = dataclasses.replace(digits, test_images=images[:3], test_labels=labels[:3])
    assert own.split()[0] is own.images
    assert own.split()[3] is own.test_labels


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [(5, None, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2]), (9, 3, [0, 4, 8]), (6, 1, [0])],
)
def test_samples_at_equal_distances(available, wanted, expected):
    assert spread_out(available, wanted).tolist() == expected
