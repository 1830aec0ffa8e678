"""Noise, nets and trainings of the large-depth experiment against exact and planted numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from conditioning import theory
from experiments.errors import ExperimentError
from experiments.large_depth import checks, noise, training
from experiments.large_depth.frontier import above_line, best_accuracies, crossing
from experiments.large_depth.laboratory import Laboratory, _generator, path_exponent
from experiments.large_depth.networks import distance, norm_chain, propagate, trajectory
from experiments.large_depth.verdicts import kolmogorov_distance, spread
from experiments.large_depth.verdicts_trained import gaps


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


# ---------------------------------------------------------------------------- noise


@pytest.mark.parametrize("what", ["gradient", "training", "embedding"])
def test_instruments_agree_with_what_they_stand_for(what, generator):
    cell = {"what": what}
    assert checks.measure(cell, generator)["error"] < 1e-13


def test_the_first_row_of_the_embedding_is_the_autocovariance():
    for hurst in checks.HURSTS:
        row = noise.circulant_row(hurst, 9).numpy()
        assert len(row) == 18
        assert row[:10] == pytest.approx(theory.fgn_autocovariance(hurst, np.arange(10)))
        assert row[1:] == pytest.approx(row[1:][::-1])
        # Eigenvalues of the matrix itself, not of its Fourier transform.
        matrix = np.array([[row[(k - j) % 18] for k in range(18)] for j in range(18)])
        values = noise.circulant_eigenvalues(hurst, 9).numpy()
        assert np.sort(np.r_[values, values[1:-1]]) == pytest.approx(
            np.linalg.eigvalsh(matrix), abs=1e-12
        )
        assert values.min() >= 0


def test_an_embedding_that_is_no_covariance_is_an_error(monkeypatch):
    row = torch.tensor([1.0, -0.9, 0.0, -0.9], dtype=torch.float64)
    monkeypatch.setattr(noise, "circulant_row", lambda *_: row)
    with pytest.raises(ExperimentError, match="negative eigenvalue"):
        noise.circulant_eigenvalues(0.3, 2)


def test_the_check_of_drawn_noise_sees_a_wrong_covariance(generator, monkeypatch):
    scores = checks.covariance(generator)["scores"]
    assert len(scores) == 20
    assert max(map(abs, scores.values())) < 4
    right = noise.fractional
    monkeypatch.setattr(noise, "fractional", lambda h, *rest: right(min(h + 0.02, 0.98), *rest))
    scores = checks.covariance(generator)["scores"]
    assert max(map(abs, scores.values())) > 10


def test_independent_entries_have_their_laws(generator):
    flat = noise.uniform(40, (500,), generator).flatten()
    assert stats.kstest(flat / 3**0.5, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    bell = noise.normal(40, (500,), generator).flatten()
    assert stats.kstest(bell, stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("depth", [7, 150])
def test_smooth_factors_have_the_covariance_of_the_kernel(depth):
    times = torch.arange(depth + 1, dtype=torch.float64) / depth
    exact = torch.exp(-((times[:, None] - times) ** 2) / (2 * 0.1**2))
    process = noise.smooth_factor(depth)
    assert torch.allclose(process @ process.T, exact[1:, 1:], atol=1e-11, rtol=0)
    change = exact.diff(dim=0).diff(dim=1)
    change /= change.diagonal().mean()
    increments = noise.smooth_factor(depth, "increments")
    assert torch.allclose(increments @ increments.T, change, atol=1e-8, rtol=0)


def test_smooth_paths_are_the_same_at_every_depth():
    coarse, fine = (
        noise.smooth(noise.smooth_factor(depth), (3,), torch.Generator().manual_seed(5))
        for depth in (20, 80)
    )
    assert torch.allclose(coarse, noise.coarser_samples(fine, 4), atol=1e-8)


def test_smooth_weights_of_no_known_kind_are_an_error():
    with pytest.raises(ExperimentError, match="'process' or 'increments'"):
        noise.smooth_factor(10, "derivative")
    with pytest.raises(ExperimentError, match="bandwidth must be at least"):
        noise.smooth_factor(10, bandwidth=0.01)


def test_coarser_increments_add_up():
    fine = torch.arange(12, dtype=torch.float64)
    assert noise.coarser_increments(fine, 4).tolist() == [3.0, 11.0, 19.0]
    assert noise.coarser_samples(fine, 4).tolist() == [3.0, 7.0, 11.0]
    with pytest.raises(ExperimentError, match="use a divisor"):
        noise.coarser_samples(fine, 5)


def test_brownian_paths_end_with_unit_variance(generator):
    increments = noise.fractional(0.8, 64, (4000,), generator)
    end = noise.brownian_paths(increments, 0.8)[-1]
    assert float(end.var()) == pytest.approx(1, abs=0.1)


# ----------------------------------------------------------------------------- nets


def test_seeds_differ_in_the_bits_that_count():
    # The generator of the CPU takes the low 32 bits.
    seeds = {_generator({"part": "iid", "L": depth}).initial_seed() for depth in range(200)}
    assert len(seeds) == 200
    assert max(seeds) < 2**32


def test_norms_beyond_float64_are_kept_as_logarithms():
    depth, factor = 1000, 9.0
    weights = ones(depth, 1, 1, 1)
    found = propagate(weights, weights, ones(1, 1, 1), ones(1, 1), [factor, 1e-9])
    grown = depth * math.log(1 + factor)
    assert grown > 2000
    for logs in (found.output, found.gradient, found.output_norm, found.gradient_norm):
        assert float(logs[0, 0, 0]) == pytest.approx(grown, rel=1e-12)
    # Small movements do not drown either: (1 + 1e-9)^1000 - 1.
    small = math.log(math.expm1(depth * math.log1p(1e-9)))
    assert float(found.output[0, 1, 0]) == pytest.approx(small, abs=1e-6)
    assert float(found.gradient[0, 1, 0]) == pytest.approx(small, abs=1e-6)


def test_states_that_shrink_move_by_their_own_norm():
    weights = -ones(300, 1, 1, 1)
    found = propagate(weights, None, ones(1, 1, 1), ones(1, 1), [0.9])
    assert float(found.output_norm) == pytest.approx(300 * math.log(0.1))
    assert float(found.output) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("block", ["res-1", "res-3"])
@pytest.mark.parametrize("hurst", [0.2, 0.5, 0.85])
def test_movements_at_small_scaling_are_those_of_the_first_order(block, hurst, generator):
    depth, width, nets, alpha = 20, 4, 6000, 1e-6
    matrices = 2 if block == "res-3" else 1
    weights = noise.fractional(hurst, depth, (matrices, nets, width, width), generator) / width**0.5
    start, last = noise.normal(2, (nets, width), generator)
    inner = weights[:, 1] if matrices == 2 else None
    found = propagate(weights[:, 0], inner, start[..., None], last, [alpha])
    for logs, gradient in ((found.output, False), (found.gradient, True)):
        squares = (2 * logs.flatten()).exp() / alpha**2
        exact = theory.first_order_sum(depth, hurst, block, gradient=gradient, width=width)
        error = float(squares.std()) / nets**0.5
        assert abs(float(squares.mean()) - exact) < 4 * error
    if block == "res-3" and hurst == 0.85:
        # Neither that of outputs nor that of gradients of very wide nets.
        for other in (
            theory.first_order_sum(depth, hurst),
            theory.first_order_sum(depth, hurst, gradient=True),
        ):
            assert abs(float(squares.mean()) - other) > 6 * error


def test_trajectories_and_distances_of_a_net_of_one_unit():
    weights = ones(8, 2, 1, 1)
    start = torch.tensor([[[1.0]], [[2.0]]], dtype=torch.float64)
    coarse = trajectory(weights[:4], None, start, 1 / 4)
    fine = trajectory(weights, weights, start, 1 / 8)
    assert coarse[:, 0, 0].tolist() == pytest.approx([1.25**k for k in range(5)])
    assert fine[-1, 1, 0] == pytest.approx(2 * 1.125**8)
    gap = 1.125**8 - 1.25**4
    assert distance(coarse, fine).tolist() == pytest.approx([gap, gap])


def test_the_chain_of_norms_has_the_law_of_the_nets(generator):
    depth, width, alpha, nets = 6, 4, 0.6, 30000
    chain = norm_chain(depth, width, alpha, nets, np.random.default_rng(0))
    squares = np.exp(2 * chain)
    exact = theory.norm_second_moment(depth, alpha)
    assert abs(squares.mean() - exact) < 4 * squares.std() / nets**0.5
    weights = noise.normal(depth, (2, 4000, width, width), generator) / width**0.5
    start, last = noise.normal(2, (4000, width), generator)
    found = propagate(weights[:, 0], weights[:, 1], start[..., None], last, [alpha])
    assert stats.ks_2samp(chain, found.output_norm.flatten().numpy()).pvalue > 1e-3


# ------------------------------------------------------------------------- training


def lanes(count, depth=4, width=5, pixels=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    return training.Lanes(
        *(
            torch.randn(*shape, generator=generator, dtype=torch.float64) / 2
            for shape in (
                (count, width, pixels), (depth, count, width, width), (count, classes, width)
            )
        )
    )  # fmt: skip


def test_lanes_do_not_see_each_other():
    pixels = torch.rand(6, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.arange(30) % 3
    schedule = training.Schedule(epochs=3, batch=8)

    def run(weights, rates):
        alphas = torch.full((len(rates),), 0.5, dtype=torch.float64)
        rates = torch.tensor(rates, dtype=torch.float64)
        losses = training.train(
            weights, alphas, rates, pixels, labels, schedule, torch.Generator().manual_seed(3)
        )
        return losses, weights

    both, pair = run(lanes(2), [0.01, math.inf])
    one = lanes(2)
    alone, single = run(
        training.Lanes(one.first[:1], one.layers[:, :1], one.last[:1]), [0.01]
    )  # fmt: skip
    assert torch.allclose(both[:, 0], alone[:, 0], rtol=1e-12)
    assert torch.allclose(pair.layers[:, 0], single.layers[:, 0], rtol=1e-10)
    # The other one has diverged, and gets nothing right.
    assert not torch.isfinite(both[-1, 1])
    right = training.accuracy(pair, torch.full((2,), 0.5, dtype=torch.float64), pixels, labels)
    assert right[1] == 0
    assert right[0] > 0


def test_training_lowers_the_loss():
    pixels = torch.rand(6, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = pixels[:3].argmax(0)
    alphas, rates = ones(2) * 0.5, ones(2) * 0.02
    losses = training.train(
        lanes(2), alphas, rates, pixels, labels, training.Schedule(epochs=20, batch=10),
        torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert losses.shape == (20, 2)
    assert bool((losses[-1] < 0.5 * losses[0]).all())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nets_run_on_a_gpu_as_on_the_cpu(generator):
    weights = noise.fractional(0.7, 50, (2, 3, 8, 8), generator) / 8**0.5
    start, last = noise.normal(1, (3, 8, 2), generator)[0], noise.normal(1, (3, 8), generator)[0]
    here = propagate(weights[:, 0], weights[:, 1], start, last, [0.1, 1.0])
    gpu = weights.cuda()
    there = propagate(gpu[:, 0], gpu[:, 1], start.cuda(), last.cuda(), [0.1, 1.0])
    assert torch.allclose(here.output, there.output, rtol=1e-10)
    assert torch.allclose(here.gradient, there.gradient, rtol=1e-10)
    pixels, labels = (
        torch.rand(6, 30, generator=generator, dtype=torch.float64),
        torch.arange(30) % 3,
    )
    losses = []
    for device in ("cpu", "cuda"):
        net = training.Lanes(*(tensor.to(device) for tensor in lanes(2).tensors))
        alphas, rates = (ones(2) * value for value in (0.5, 0.02))
        losses.append(training.train(
            net, alphas.to(device), rates.to(device), pixels.to(device), labels.to(device),
            training.Schedule(epochs=3, batch=8), torch.Generator().manual_seed(3),
        ).cpu())  # fmt: skip
    assert torch.allclose(*losses, rtol=1e-9)


def test_a_schedule_without_epochs_is_an_error():
    with pytest.raises(ExperimentError, match="at least 1"):
        training.Schedule(epochs=0, batch=5)


# -------------------------------------------------------------------------- readings


def test_exponents_of_paths_with_known_ones(generator):
    line = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None] ** 2
    white = noise.normal(300, (400,), generator)
    assert path_exponent(line) == pytest.approx(1, abs=0.02)
    assert path_exponent(white) == pytest.approx(0, abs=0.02)
    assert path_exponent(white.cumsum(0)) == pytest.approx(0.5, abs=0.02)
    for hurst in (0.3, 0.8):
        path = noise.brownian_paths(noise.fractional(hurst, 300, (400,), generator), hurst)
        assert path_exponent(path) == pytest.approx(hurst, abs=0.03)
    assert math.isnan(path_exponent(ones(9)))
    white[3, 0] = math.inf
    assert math.isnan(path_exponent(white))


def test_crossings_are_interpolated_and_missing_ones_are_said():
    betas = [0.0, 0.5, 1.0]
    assert crossing(betas, [3.0, 1.0, -1.0]) == pytest.approx(0.75)
    assert crossing(betas, [1.0, -3.0, 1.0]) == pytest.approx(0.125)
    assert crossing(betas, [2.0, 0.0, -1.0]) == 0.5
    for logs in ([-1.0, -2.0, -3.0], [3.0, 2.0, 1.0], [math.nan, 1.0, -1.0], [2.0, math.inf, -1.0]):
        assert math.isnan(crossing(betas, logs)), logs


def test_the_line_divides_the_map_of_accuracies():
    above = above_line([0.1, 0.9], [0.2, 0.5, 0.95], 1000)
    assert above.tolist() == [[True, True, True], [False, False, True]]


def test_the_learning_rate_is_chosen_by_training_accuracy():
    result = {"train": [[[0.5, 0.9], [0.8, 0.1]]], "test": [[[0.7, 0.6], [0.2, 0.99]]]}
    found = best_accuracies([({"part": "accuracy", "H": [0.3], "seed": 4}, result)])
    assert found[4][0.3].tolist() == [0.6, 0.2]


def test_spreads_and_distances_have_their_confidence():
    rng, inside, apart = np.random.default_rng(0), 0, 0
    for _ in range(400):
        found = spread(rng.normal(scale=2.0, size=15), expected=2.0)
        inside += found.low <= 2.0 <= found.high
    assert 360 <= inside <= 396
    assert math.isnan(spread([1.0], expected=1.0).value)
    assert math.isnan(spread([1.0, math.inf], expected=1.0).value)
    mean, variance = theory.limit_log_norm_law(40)
    for _ in range(100):
        logs = mean / 2 + variance**0.5 / 2 * rng.normal(size=300)
        apart += kolmogorov_distance(logs, 40).low > 0
    assert apart <= 12
    assert kolmogorov_distance(logs + variance**0.5 / 2, 40).low > 0.2
    for broken in ([], [math.nan], [1.0, math.inf]):
        assert math.isnan(kolmogorov_distance(broken, 40).value)


def test_the_distance_sees_the_term_of_ito():
    mean, variance = theory.limit_log_norm_law(100)
    logs = mean / 2 + variance**0.5 / 2 * stats.norm.ppf((np.arange(20000) + 0.5) / 20000)
    assert kolmogorov_distance(logs, 100).high < 0.025
    assert kolmogorov_distance(logs + 1 / 200, 100).value > 0.025


def test_gaps_of_accuracy_are_taken_at_equal_values():
    above = np.array([[False, True, True], [False, False, True]])
    # A law of the column alone has no gap within columns, and one of the row none within rows.
    columns = np.array([[[0.1, 0.5, 0.9]] * 2])
    rows = np.array([[[0.8] * 3, [0.3] * 3]])
    assert gaps(columns, above, axis=0) == [0.0]
    assert gaps(columns, above, axis=1) == pytest.approx([(0.6 + 0.6) / 2])
    assert gaps(rows, above, axis=1) == [0.0]
    assert gaps(rows, above, axis=0) == pytest.approx([0.5])
    assert math.isnan(gaps(rows, np.ones_like(above), axis=0)[0])


def test_a_smooth_path_of_the_same_size_is_what_roughness_is_compared_with(generator):
    lab = Laboratory.__new__(Laboratory)
    before = noise.uniform(128, (1, 12, 12), generator)
    change = noise.smooth(noise.smooth_factor(128), (1, 12, 12), generator)
    risen = path_exponent(before + change) - path_exponent(before)
    found = lab._if_smooth(before, change, generator)
    assert found == pytest.approx(risen, rel=0.2)
    # Some 4 ** 2 / (128 * 0.1) ** 2 of the mean square, over two octaves.
    assert 0.005 < found < 0.05
