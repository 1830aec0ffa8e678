"""Singular values of layers: dense truth for every operator and route, and bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from dense_layers import assert_all_known, circular_matrix_of, kernel_matrix_of, matrix_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import conditioning
from conditioning.errors import DenseTooLargeError, InvalidArgumentError
from conditioning.singular import LayerOperator, geometry_of, singular_values, values

# (class, arguments, options, shape of an input that every stride divides)
LAYERS = [
    (nn.Conv1d, (2, 3, 3), {}, (2, 8)),
    (nn.Conv1d, (2, 3, 3), {"padding": 1, "stride": 2}, (2, 8)),
    (nn.Conv1d, (3, 2, 4), {"padding": 3, "stride": 2}, (3, 6)),
    (nn.Conv1d, (2, 2, 3), {"padding": "same", "dilation": 2}, (2, 7)),
    (nn.Conv1d, (2, 2, 4), {"padding": "same", "padding_mode": "circular"}, (2, 7)),
    (nn.Conv1d, (2, 3, 3), {"padding": 2, "padding_mode": "reflect"}, (2, 6)),
    (nn.Conv1d, (2, 3, 3), {"padding": 2, "padding_mode": "replicate"}, (2, 6)),
    (nn.Conv1d, (2, 3, 2), {"stride": 2, "padding": 1, "padding_mode": "replicate"}, (2, 6)),
    (nn.Conv1d, (2, 3, 2), {"stride": 2, "dilation": 3}, (2, 12)),
    (nn.Conv1d, (2, 3, 2), {"stride": 4}, (2, 12)),
    (nn.Conv1d, (4, 6, 3), {"groups": 2, "padding": 1}, (4, 7)),
    (nn.Conv1d, (1, 1, 1), {}, (1, 1)),
    (nn.Conv2d, (2, 3, 3), {"padding": 1}, (2, 5, 4)),
    (nn.Conv2d, (2, 3, 3), {"padding": 1, "stride": 2}, (2, 6, 4)),
    (nn.Conv2d, (3, 2, 3), {"padding": 1, "stride": 3}, (3, 6, 6)),
    (nn.Conv2d, (2, 3, 2), {"stride": 2}, (2, 6, 4)),
    (nn.Conv2d, (2, 9, 2), {"stride": 2, "bias": False}, (2, 6, 4)),
    (nn.Conv2d, (2, 3, 2), {"stride": 2, "padding": 1}, (2, 6, 4)),
    (nn.Conv2d, (2, 3, 3), {"stride": 3, "padding": 2}, (2, 6, 3)),
    (nn.Conv2d, (2, 3, 1), {"stride": 2}, (2, 6, 4)),
    (nn.Conv2d, (2, 3, 1), {"padding": 1}, (2, 3, 4)),
    (nn.Conv2d, (4, 2, 1), {}, (4, 3, 4)),
    (nn.Conv2d, (2, 3, (1, 3)), {"padding": (0, 1)}, (2, 5, 4)),
    (nn.Conv2d, (2, 3, (3, 2)), {"padding": (1, 0), "stride": (1, 2)}, (2, 5, 4)),
    (nn.Conv2d, (2, 3, (3, 1)), {"padding": (1, 0), "stride": (1, 2)}, (2, 5, 4)),
    (nn.Conv2d, (2, 5, (3, 1)), {"padding": (1, 0), "stride": (2, 2)}, (2, 4, 4)),
    (nn.Conv2d, (2, 3, (3, 2)), {"padding": (2, 1), "dilation": (2, 1)}, (2, 6, 4)),
    (nn.Conv2d, (2, 3, 3), {"padding": "same", "dilation": (1, 2)}, (2, 5, 4)),
    (nn.Conv2d, (2, 3, 3), {"padding": "valid"}, (2, 5, 4)),
    (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (2, 5, 4)),
    (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular", "stride": 2}, (2, 6, 4)),
    (nn.Conv2d, (2, 3, 3), {"padding": 2, "padding_mode": "circular"}, (2, 5, 4)),
    (nn.Conv2d, (2, 2, 3), {"padding": 1, "padding_mode": "reflect", "stride": 2}, (2, 4, 4)),
    (nn.Conv2d, (2, 2, 3), {"padding": 1, "padding_mode": "replicate"}, (2, 4, 3)),
    (nn.Conv2d, (4, 4, 3), {"padding": 1, "groups": 4}, (4, 5, 4)),
    (nn.Conv2d, (4, 8, 3), {"padding": 1, "groups": 2, "stride": 2}, (4, 4, 4)),
    (nn.Conv2d, (4, 8, 2), {"groups": 4, "stride": 2}, (4, 4, 4)),
    (nn.Conv2d, (1, 2, 7), {"padding": 3}, (1, 4, 4)),
    (nn.Conv3d, (1, 2, 3), {"padding": 1}, (1, 3, 3, 3)),
    (nn.Conv3d, (2, 1, (1, 3, 3)), {"padding": (0, 1, 1), "stride": (1, 2, 1)}, (2, 3, 4, 3)),
    (nn.Conv3d, (2, 2, (3, 1, 1)), {"padding": (1, 0, 0), "groups": 2}, (2, 4, 2, 3)),
    (nn.Conv3d, (1, 3, 2), {"stride": 2}, (1, 4, 2, 4)),
    (nn.Conv3d, (1, 2, 3), {"padding": 1, "padding_mode": "circular"}, (1, 3, 3, 4)),
    (nn.ConvTranspose1d, (2, 3, 3), {}, (2, 5)),
    (nn.ConvTranspose1d, (3, 2, 4), {"stride": 2, "padding": 1}, (3, 5)),
    (nn.ConvTranspose1d, (2, 3, 2), {"stride": 3, "output_padding": 2}, (2, 4)),
    (nn.ConvTranspose1d, (2, 2, 3), {"dilation": 2, "padding": 1}, (2, 5)),
    (nn.ConvTranspose2d, (2, 3, 2), {"stride": 2}, (2, 3, 4)),
    (nn.ConvTranspose2d, (2, 3, 2), {"stride": 2, "padding": 1, "output_padding": 1}, (2, 3, 4)),
    (nn.ConvTranspose2d, (2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (2, 3, 3)),
    (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2}, (4, 2, 3)),
    (nn.ConvTranspose2d, (2, 3, (1, 3)), {"stride": (2, 1), "output_padding": (1, 0)}, (2, 3, 3)),
    (nn.ConvTranspose2d, (7, 1, (2, 3)), {"stride": (2, 1), "output_padding": (1, 0)}, (7, 4, 5)),
    (nn.ConvTranspose2d, (3, 1, (2, 3)), {"stride": (2, 1), "output_padding": (1, 0)}, (3, 4, 5)),
    (nn.ConvTranspose3d, (2, 1, 2), {"stride": (1, 2, 2)}, (2, 2, 2, 3)),
]  # fmt: skip


def made(kind, arguments, options):
    torch.manual_seed(0)
    return kind(*arguments, **options).double()


@pytest.mark.parametrize(("kind", "arguments", "options", "shape"), LAYERS)
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_the_true_operator_is_the_layer_as_it_runs(kind, arguments, options, shape, method):
    layer = made(kind, arguments, options)
    result = singular_values(layer, shape, method=method)
    assert_all_known(result, matrix_of(layer, shape))
    assert (result.operator, result.input_shape) == ("true", shape)


@pytest.mark.parametrize(("kind", "arguments", "options", "shape"), LAYERS)
def test_the_circular_operator_is_the_layer_on_circles(kind, arguments, options, shape):
    layer = made(kind, arguments, options)
    g = geometry_of(layer)
    if not g.transposed:
        shape = (shape[0], *(n - n % s for n, s in zip(shape[1:], g.stride, strict=True)))
    result = singular_values(layer, shape, "circular")
    assert_all_known(result, circular_matrix_of(layer, shape))
    assert result.operator == "circular"


@pytest.mark.parametrize(("kind", "arguments", "options", "shape"), LAYERS)
def test_the_kernel_is_the_matrix_of_a_window(kind, arguments, options, shape):
    layer = made(kind, arguments, options)
    result = singular_values(layer, operator="kernel")
    assert_all_known(result, kernel_matrix_of(layer))
    assert (result.operator, result.input_shape) == ("kernel", None)
    assert singular_values(layer, shape, operator="kernel").largest == result.largest


@pytest.mark.parametrize(("kind", "arguments", "options", "shape"), LAYERS[::3])
def test_products_alone_enclose_both_ends(kind, arguments, options, shape):
    layer = made(kind, arguments, options)
    expected = torch.linalg.svdvals(matrix_of(layer, shape))
    result = singular_values(layer, shape, method="lanczos")
    slack = 1e-14
    assert result.largest.low - slack <= float(expected[0]) <= result.largest.high + slack
    assert result.smallest.low - slack <= float(expected[-1]) <= result.smallest.high + slack
    norm = float(expected.norm())
    assert result.backward_gain == pytest.approx(norm / result.shape[0] ** 0.5, rel=1e-12)
    assert result.forward_gain == pytest.approx(norm / result.shape[1] ** 0.5, rel=1e-12)


@st.composite
def layers(draw):
    axes = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 2))
    arguments = (groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 3)))
    each = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    if draw(st.booleans()):
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[axes - 1]
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        kind = (nn.Conv1d, nn.Conv2d)[axes - 1]
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        options["padding"] = tuple(draw(st.integers(0, 2)) for _ in kernel)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = tuple(max(3, span) + draw(st.integers(0, 2)) for span in spans)
    return kind, (*arguments, kernel), options, (arguments[0], *sizes)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_any_layer_has_the_singular_values_of_its_dense_matrix(case):
    kind, arguments, options, shape = case
    layer = made(kind, arguments, options)
    result = singular_values(layer, shape)
    assert_all_known(result, matrix_of(layer, shape))


# ---------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("operator", ["true", "circular", "kernel"])
def test_a_linear_layer_needs_no_shape_and_is_its_weight(operator):
    torch.manual_seed(0)
    layer = nn.Linear(5, 7).double()
    result = singular_values(layer, operator=operator)
    assert_all_known(result, layer.weight.detach())
    assert result.operator == operator
    assert result.num_matvecs == 0


def test_a_linear_layer_on_a_sequence_repeats_its_values():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    result = singular_values(layer, (4, 2, 5))
    assert_all_known(result, matrix_of(layer, (4, 2, 5)))
    assert len(result.values) == 24


# ------------------------------------------------------------- what the paper measured


def with_polar_factor(layer, sigma):
    matrix = layer.weight.detach().flatten(1)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_((sigma * left @ right).view_as(layer.weight))
    return layer


def test_a_2x2_kernel_with_orthonormal_rows_is_an_isometry_of_gradients():
    torch.manual_seed(0)
    layer = with_polar_factor(nn.Conv2d(32, 64, 2, stride=2, bias=False).double(), 1.0)
    result = singular_values(layer, (32, 8, 8))
    assert result.shape == (1024, 2048)
    assert (result.values - 1).abs().max() < 1e-13
    assert result.backward_gain == pytest.approx(1, abs=1e-13)
    assert result.condition.value == pytest.approx(1, abs=1e-12)


def test_a_1x1_kernel_with_stride_2_leaves_half_of_the_gradients_out():
    torch.manual_seed(0)
    layer = with_polar_factor(nn.Conv2d(32, 64, 1, stride=2, bias=False).double(), 2**0.5)
    result = singular_values(layer, (32, 8, 8))
    assert (len(result.values), result.rank) == (1024, 512)
    assert (result.values[:512] - 2**0.5).abs().max() < 1e-13
    assert result.smallest.value == 0
    assert math.isinf(result.condition.value)
    assert result.smallest_nonzero.value == pytest.approx(2**0.5)
    assert result.backward_gain == pytest.approx(1, abs=1e-13)
    assert "rank 512" in result.message


def test_a_stem_with_a_polar_factor_is_flat_on_circles_but_not_with_zero_padding():
    torch.manual_seed(0)
    sigma = (64 / 27) ** 0.5
    layer = with_polar_factor(nn.Conv2d(3, 64, 3, padding=1, bias=False).double(), sigma)
    circular = singular_values(layer, (3, 32, 32), "circular")
    assert circular.largest.value == pytest.approx(4.619, abs=5e-4)
    assert circular.smallest.value == pytest.approx(4.619, abs=5e-4)
    true = singular_values(layer, (3, 32, 32))
    # W^T W is diagonal: at a corner 4 of the 9 taps are left, inside all.
    assert (64 / 3) ** 0.5 in true.largest
    assert true.smallest.value == pytest.approx((64 / 3) ** 0.5 * 2 / 3, rel=1e-9)
    assert true.smallest.value == pytest.approx(3.08, abs=2e-3)
    assert true.backward_gain / circular.backward_gain == pytest.approx((94 / 96), abs=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_padding_costs_the_share_of_taps_that_reach_over_the_border(stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1, stride=stride).double()
    with torch.no_grad():  # all taps weigh the same
        layer.weight.copy_(layer.weight[..., :1, :1].expand_as(layer.weight).clone())
    size = 16
    outputs = size // stride
    true = singular_values(layer, (8, size, size), method="lanczos", max_matvecs=3)
    circular = singular_values(layer, (8, size, size), "circular")
    lost = 2 if stride == 1 else 1
    factor = ((3 * outputs - lost) / (3 * outputs)) ** 2
    assert true.backward_gain**2 / circular.backward_gain**2 == pytest.approx(factor, rel=1e-12)


def test_the_circular_operator_misses_the_small_singular_values_of_zero_padding():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3, padding=1, stride=2).double()
    true = singular_values(layer, (16, 8, 8))
    circular = singular_values(layer, (16, 8, 8), "circular")
    assert true.largest.value == pytest.approx(circular.largest.value, rel=0.15)
    assert true.smallest.value < 0.7 * circular.smallest.value
    assert "operator='true'" in circular.message


@pytest.mark.parametrize("side", ["backward", "forward"])
def test_gains_are_those_of_random_directions(side):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode="reflect")
    result = singular_values(layer, (3, 12, 12))
    operator = LayerOperator(layer, (3, 12, 12))
    backward = side == "backward"
    probes = torch.randn(operator.shape[0 if backward else 1], 400, dtype=torch.float64)
    products = (operator.rmatvec if backward else operator.matvec)(probes)
    gain = float(products.norm() / probes.norm())
    assert (result.backward_gain if backward else result.forward_gain) == pytest.approx(
        gain, rel=0.02
    )


# -------------------------------------------------------------------------- products


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, stride=2), (8, 16, 16)),
        (nn.Conv2d(3, 24, 3, padding=1), (3, 16, 16)),
        (nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1), (12, 8, 8)),
        (nn.Conv1d(8, 8, 5, padding=2, padding_mode="replicate"), (8, 80)),
    ],
)
def test_enclosures_by_products_hold_the_dense_values(layer, shape):
    torch.manual_seed(1)
    layer.reset_parameters()
    layer.double()
    dense = singular_values(layer, shape, method="dense")
    found = singular_values(layer, shape, method="lanczos", max_matvecs=400)
    assert found.values is None
    assert found.rank is None
    assert found.num_matvecs < 402
    for exact, enclosed in ((dense.largest, found.largest), (dense.smallest, found.smallest)):
        # In extended precision the largest of the first layer lies in both: SVD rounds, too.
        assert exact.low <= enclosed.high
        assert enclosed.low <= exact.high
    assert found.largest.high <= 1.01 * found.largest.low
    assert found.backward_gain == pytest.approx(dense.backward_gain, rel=1e-12)
    assert found.failure_probability == 1e-6
    if found.smallest.low > 0:
        assert found.smallest_nonzero == found.smallest


def test_axes_with_whole_windows_are_measured_at_one_window():
    torch.manual_seed(0)
    layer = nn.Conv3d(24, 24, (3, 1, 1), padding=(1, 0, 0))
    found = singular_values(layer, (24, 40, 16, 16))
    assert found.shape == (24 * 40 * 256,) * 2
    assert found.status == "exact"
    assert found.num_matvecs <= 24 * 40 + 1
    alone = singular_values(layer, (24, 40, 1, 1))
    assert torch.equal(found.values[::256], alone.values)


def test_zeros_that_the_shape_tells_take_no_products():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 30, (9, 1), padding=(4, 0), stride=(1, 2)).double()
    found = singular_values(layer, (6, 64, 2), max_matvecs=300)
    expected = torch.linalg.svdvals(matrix_of(layer, (6, 64, 2)))
    assert "384 are zero by the shape alone" in found.message
    assert float(expected[-1]) < 1e-12
    assert found.smallest.high == 0
    assert float(expected[0]) in found.largest
    assert found.smallest_nonzero is None


def test_a_budget_that_ends_early_says_what_would_help():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    found = singular_values(layer, (16, 8, 8), max_matvecs=20)
    assert found.status == "one-sided"
    assert found.num_matvecs <= 20
    assert "max_matvecs" in found.message
    assert "method='dense'" in found.message


def test_one_seed_gives_one_result():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1)
    options = {"method": "lanczos", "max_matvecs": 60, "seed": 3}
    assert singular_values(layer, (4, 8, 8), **options) == singular_values(
        layer, (4, 8, 8), **options
    )


def test_little_memory_takes_smaller_pieces_and_finds_the_same():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    wide = singular_values(layer, (4, 8, 8), "circular")
    narrow = singular_values(layer, (4, 8, 8), "circular", memory_budget=1000)
    assert (wide.values - narrow.values).abs().max() < 1e-14
    ends = singular_values(layer, (4, 8, 8), memory_budget=200_000)
    assert ends.values is None
    assert wide.largest.value > ends.largest.low > 0
    with pytest.raises(DenseTooLargeError, match="memory_budget"):
        singular_values(layer, (4, 8, 8), method="dense", memory_budget=200_000)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_products_enclose_the_ends_of_any_layer(case):
    kind, arguments, options, shape = case
    layer = made(kind, arguments, options)
    expected = torch.linalg.svdvals(matrix_of(layer, shape))
    # Memory for no dense matrix: what windows and circles do not settle takes products.
    found = singular_values(layer, shape, memory_budget=1, max_matvecs=200)
    for end, value in ((found.largest, expected[0]), (found.smallest, expected[-1])):
        assert end.low - 1e-13 <= float(value) <= end.high + 1e-13


@pytest.mark.parametrize(
    ("layer", "shape", "options", "dense"),
    [
        (nn.Conv2d(32, 32, 7, padding=3, groups=32), (32, 28, 28), {}, True),
        (nn.Conv2d(96, 96, 3, padding=1, groups=96), (96, 14, 14), {}, True),
        (nn.Conv2d(32, 32, 3, padding=1), (32, 8, 8), {}, True),
        (nn.Conv2d(16, 16, 3, padding=1), (16, 16, 16), {}, False),
        (nn.Conv2d(16, 16, 3, padding=1), (16, 16, 16), {"max_matvecs": 5000}, True),
        (nn.Conv2d(64, 64, 3, padding=1, groups=64), (64, 56, 56), {}, False),
        (nn.Conv2d(32, 32, 7, padding=3, groups=32), (32, 28, 28), {"max_matvecs": 500}, False),
    ],
)
def test_the_dense_route_is_taken_where_it_costs_little_more_than_products(
    layer, shape, options, dense, monkeypatch
):
    class Dense(Exception):
        pass

    class Products(Exception):
        pass

    def take_dense(self):
        raise Dense

    def take_products(*_, **__):
        raise Products

    monkeypatch.setattr(values._TrueOperator, "_dense", take_dense)
    monkeypatch.setattr(values, "singular_range", take_products)
    budget = 2**34  # whatever this machine has
    with pytest.raises(Dense if dense else Products):
        singular_values(layer, shape, memory_budget=budget, **options)


def test_an_enclosure_may_be_asked_for_by_its_width():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1)
    options = {"method": "lanczos", "rtol": 1e-3, "max_matvecs": 300}
    wide = singular_values(layer, (8, 8, 8), atol=0.2, **options)
    narrow = singular_values(layer, (8, 8, 8), **options)
    assert wide.num_matvecs < narrow.num_matvecs
    for end in (wide.largest, wide.smallest):
        assert end.high - end.low <= 0.2
    with pytest.raises(InvalidArgumentError, match="atol"):
        singular_values(layer, (8, 8, 8), atol=-1)


# --------------------------------------------------------------------------- results


def test_a_result_prints_its_operator_and_converts():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, padding=1, stride=2)
    for operator, words in (
        ("true", "true operator on (2, 6, 6), 36 x 72"),
        ("circular", "circular operator on (2, 6, 6), 36 x 72"),
        ("kernel", "kernel matrix, 4 x 18"),
    ):
        result = singular_values(layer, (2, 6, 6), operator)
        text = str(result)
        assert text.startswith("conv 3x3, 2 -> 4, stride 2, zeros padding: ")
        assert words in text
        assert "\n" not in text
        plain = json.loads(json.dumps(result.to_dict()))
        assert plain["operator"] == operator
        assert plain["largest"]["value"] == result.largest.value
        assert "values" not in plain


def test_a_zero_layer_has_rank_zero():
    layer = nn.Conv2d(2, 4, 3, padding=1)
    nn.init.zeros_(layer.weight)
    for operator in ("true", "circular", "kernel"):
        result = singular_values(layer, (2, 4, 4), operator)
        assert (result.rank, result.largest.high, result.backward_gain) == (0, 0, 0)
        assert result.smallest_nonzero is None
        assert math.isnan(result.condition.value)
        assert "the operator is zero" in result.message


def test_the_names_are_public():
    assert conditioning.singular_values is singular_values
    assert isinstance(singular_values(nn.Linear(2, 2)), conditioning.SingularValues)


def test_gains_of_every_signal_lie_within_the_bounds_of_the_side_that_can_have_any():
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Conv2d(3, 8, 3, padding=1), (3, 6, 6)),
        (nn.Conv2d(8, 3, 3, padding=1), (8, 6, 6)),
        (nn.Linear(5, 5), (5,)),
    ):
        layer = layer.double()
        found = singular_values(layer, shape)
        x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
        y = layer(x) - layer(torch.zeros_like(x))
        g = torch.randn_like(y)
        (pulled,) = torch.autograd.grad(y, x, g)
        low, high = found.backward_bounds
        assert low <= float(pulled.norm() / g.norm()) <= high
        assert (low == 0) == (found.shape[0] > found.shape[1])
        low, high = found.forward_bounds
        assert low <= float((y.norm() / x.norm()).detach()) <= high
        assert (low == 0) == (found.shape[1] > found.shape[0])
