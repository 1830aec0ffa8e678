"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance

_PAPER = "Li, Jiao, Han, Weissman, arXiv:1611.01186"
_DERIVED = "derived for this project"
_SEEN = "seen in an earlier replication on MNIST (experiments/shortcut_training/reference.py)"
# Statements that only a mistake in the program could make fail begin with this.
CHECK = "Instrument check: "
_BEST = (
    "each at its best learning rate, that of least mean final loss over its seeds, as in the "
    "paper: so chosen and judged on the same seeds"
)
_RATIO = (
    "median ratio of single runs with the enclosure of the exact Mann-Whitney test at 95 % (from "
    "four seeds on)"
)
_ORDER = "an order, not a size"
_PATHS = (
    "full spectra along gradient descent with learning rate 0.02 at L = 12, compared at the "
    "start and at equal losses above the least one, logarithms interpolated"
)

_check = [
    Claim(
        "check.descent",
        _DERIVED,
        f"{CHECK}lanes trained at once are nets trained by torch.optim.SGD on samples.",
        0.0,
        Tolerance.within(atol=1e-12),
        "float64 rounding of 20 steps",
        "Distance of all weights relative to their norm, and of the losses relative to the loss; "
        "every net, linear on moments and with a ReLU on samples, L = 6.",
    ),
]

_start = [
    Claim(
        "start.flat",
        f"{_PAPER}, figure 5",
        "κ₁₀ of the 2-shortcut net at 0.01 × Xavier does not change with depth.",
        "κ₁₀ at zero",
        Tolerance.within(rtol=0.05),
        "weights of relative size 0.01 move eigenvalues by about as much",
        "Full spectrum at every depth of the start and every seed, against the closed form at "
        "zero.",
    ),
    Claim(
        "start.linear",
        f"{_PAPER}, figure 5 (diverges); linear: {_DERIVED} (conditioning.theory)",
        "κ₁₀ of the orthogonal net grows linearly with depth.",
        1.0,
        Tolerance.within(atol=0.15),
        "flat, root, or square growth would be 0, 0.5 or 2; short depths bend the curve",
        "Exponent of κ₁₀(2L) − κ₁₀(L) in L, by least squares for each seed: mean and 95 %.",
    ),
    Claim(
        "start.explodes",
        f"{_PAPER}, figure 5",
        "κ₁₀ of the plain Xavier net explodes: above 1e5 at L = 16 and beyond.",
        1e5,
        Tolerance.at_least(),
        "2000 times the orthogonal net's; beyond that float64 is the limit, so no value is claimed",
        "The certain lower bound, every seed.",
    ),
]

_loss = [
    Claim(
        "loss.near-minimum",
        f"{_PAPER}, figure 9 (stays near the least loss); 1e-4: {_SEEN}",
        "The 2-shortcut net ends within 1e-4 of the least loss at every depth.",
        1e-4,
        Tolerance.at_most(),
        "as in the replication: 1/50,000 of the initial loss above the least one; shallow "
        "orthogonal and 1-shortcut nets reach it, too",
        f"Mean over seeds and its 95 % interval, {_BEST}.",
    ),
    Claim(
        "loss.beats-plain",
        f"{_PAPER}, figure 9",
        "It ends lower than the plain nets, orthogonal and Xavier, at every depth.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        f"Final loss above the least one: {_RATIO}, {_BEST}.",
    ),
    Claim(
        "loss.beats-shortcuts",
        _SEEN,
        "It ends lower than 1-shortcut, 3-shortcut and full-Xavier 2-shortcut nets at every depth.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        "As loss.beats-plain.",
    ),
    Claim(
        "loss.xavier-degrades",
        f"{_PAPER}, figure 9",
        "The deepest Xavier net ends higher than the shallowest.",
        1.0,
        Tolerance.more_than(),
        _ORDER,
        f"Deepest against shallowest net: {_RATIO}, {_BEST}.",
    ),
    Claim(
        "loss.orthogonal-degrades",
        f"{_PAPER}, figure 9 (others degrade)",
        "So does the deepest orthogonal net.",
        1.0,
        Tolerance.more_than(),
        _ORDER,
        "As loss.xavier-degrades.",
    ),
    Claim(
        "loss.one-degrades",
        f"{_PAPER} (1-shortcut nets behave as plain orthogonal ones)",
        "So does the deepest 1-shortcut net.",
        1.0,
        Tolerance.more_than(),
        _ORDER,
        "As loss.xavier-degrades.",
    ),
    Claim(
        "loss.two-keeps",
        f"{_PAPER}, figure 9 (stays near the least loss)",
        "The deepest 2-shortcut net does not.",
        1.0,
        Tolerance.at_most(),
        "no worse when deep",
        "As loss.xavier-degrades.",
    ),
    Claim(
        "loss.full-xavier",
        _SEEN,
        "From full Xavier no learning rate of the grid keeps all seeds of the 2-shortcut net "
        "finite, from L = 24 on.",
        1.0,
        Tolerance.within(),
        "diverged or not; the grid begins at 1e-4, and smaller rates need not diverge",
        "At each learning rate some seed diverges, and so does the mean; L >= 24.",
    ),
]

_rate = [
    Claim(
        "rate.larger",
        f"{_PAPER}, figure 9 (tolerates larger ones)",
        "The best learning rate of the 2-shortcut net is larger than that of every other net, at "
        "every depth.",
        1.0,
        Tolerance.more_than(),
        _ORDER,
        "Ratio of the best learning rates; the enclosure goes over those found when one seed is "
        "left out, and half a step of the grid farther for each. Nets without one have none.",
    ),
    Claim(
        "rate.falls",
        f"{_DERIVED}: 2/λ_max, and λ_max grows as L (conditioning.theory)",
        "The best learning rate of the orthogonal and the 1-shortcut net falls as 1/L.",
        -1.0,
        Tolerance.within(atol=0.25),
        "a constant or a root would be 0 or −0.5; a step of the grid at either end moves it by 0.2",
        "Least-squares exponent over depths with its 95 % interval.",
    ),
    Claim(
        "rate.keeps",
        f"{_PAPER}, figure 9 (tolerates higher ones); the exponent: {_DERIVED}",
        "That of the 2-shortcut net does not fall with depth.",
        0.0,
        Tolerance.at_least(),
        "the curvature along its solutions, R products of two matrices of size R^-1/2, stays",
        "As rate.falls.",
    ),
]

_RATE_OF = (
    "Mean Frobenius norm of the matrices at the end: exponent over depths of each seed, mean "
)


def _norm_rate(depth: int, exponent: str, value: float) -> Claim:
    return Claim(
        f"norm.rate-{depth}",
        f"{_DERIVED} (conditioning.theory.near_global_minimiser_norm: such minima exist; not that "
        "descent finds them)",
        f"For shortcuts of depth {depth} it falls as {exponent}.",
        value,
        Tolerance.within(atol=0.1),
        "the three rates are 0.17 or more apart",
        f"{_RATE_OF}and 95 %, {_BEST}.",
    )


_norm = [
    Claim(
        "norm.falls",
        f"{_PAPER}, figures 2 and 3",
        "The deeper a net with shortcuts, the smaller its weights at the end.",
        0.0,
        Tolerance.less_than(),
        _ORDER,
        f"{_RATE_OF}and 95 %; depth 1, 2 and 3, {_BEST}.",
    ),
    _norm_rate(1, "1/L", -1.0),
    _norm_rate(2, "L^-1/2", -0.5),
    _norm_rate(3, "L^-1/3", -1 / 3),
    Claim(
        "norm.few",
        _DERIVED,
        "Deep 3-shortcut nets use a smaller share of their units than 2-shortcut nets: more stay "
        "at zero, where one more derivative vanishes.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        "Participation ratio of the units' squared norms at the end, 1 if all are alike, deepest "
        f"nets: {_RATIO}, {_BEST}.",
    ),
]

_path = [
    Claim(
        "path.smaller",
        f"{_PAPER}, figures 6 and 7",
        "κ₁₀ of the 2-shortcut net is smaller than the orthogonal net's all along the training.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        f"κ₁₀ over κ₁₀: {_PATHS}; {_RATIO}.",
    ),
    Claim(
        "path.smaller-early",
        f"{_PAPER}, figures 6 and 7 (most at large loss)",
        "It is while the loss above the least one falls to a tenth.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        "As path.smaller, at the levels down to a tenth of the initial value.",
    ),
    Claim(
        "path.larger-late",
        _SEEN,
        "Where the loss above the least one is 3 % of its initial value, it is larger.",
        1.0,
        Tolerance.more_than(),
        _ORDER,
        "As path.smaller, at the level 10^-1.5.",
    ),
    Claim(
        "path.same-end",
        f"{_PAPER}, figures 6 and 7",
        "At the end both have about the same κ₁₀.",
        0.0,
        Tolerance.within(atol=0.301),
        "'about': up to a factor of 2 either way",
        "Decimal logarithm of the ratio, as path.smaller, at the last level, 10^-3.",
    ),
    Claim(
        "path.diverges",
        f"{_DERIVED}: at a minimum all but d² eigenvalues are zero",
        "κ₁₀ grows towards the least loss: by 10 or more once the loss above it is a tenth of the "
        "initial one.",
        10.0,
        Tolerance.at_least(),
        "a constant would be 1",
        "The last spectrum, at 10^-3 or after the last step, against that at 10^-1; both nets, "
        "every seed.",
    ),
    Claim(
        "path.xavier",
        f"{_PAPER}, figures 5 to 7",
        "κ₁₀ of the Xavier net is larger than that of both, as far down as its loss comes.",
        1.0,
        Tolerance.more_than(),
        _ORDER,
        "Its one seed against every seed of the others, at the levels that it reaches. The rate is "
        "not small for this net: its first step takes most of the loss away.",
    ),
    Claim(
        "path.index-below",
        f"{_PAPER}, figure 8",
        "The index of the 2-shortcut net stays below the orthogonal net's.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        f"Index over index: {_PATHS}; {_RATIO}.",
    ),
    Claim(
        "path.index-early",
        f"{_PAPER}, figure 8 (drops sharply at the start)",
        "More than half of its drop is done when the loss above the least one has halved.",
        0.5,
        Tolerance.more_than(),
        "a drop in step with the loss would be 0.5",
        "1/2 less the index at that loss, over 1/2 less the least index: mean over seeds, 95 %.",
    ),
    Claim(
        "path.peak",
        f"{_PAPER}, figure 8",
        "The gradient norm of the 2-shortcut net peaks when its index drops.",
        1.0,
        Tolerance.within(rtol=0.2),
        "the drop itself takes longer than that",
        "Step at which half of the drop is done, interpolated between spectra, over the step of "
        "the largest gradient norm: mean over seeds, 95 %.",
    ),
]

_relu = [
    Claim(
        "relu.two-improves",
        f"{_PAPER}, figure 10",
        "With a ReLU in the middle the deepest 2-shortcut net ends lower than the shallowest.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        f"Final loss, deepest against shallowest net: {_RATIO}, {_BEST}.",
    ),
    Claim(
        "relu.orthogonal-does-not",
        f"{_PAPER}, figure 10",
        "The deepest orthogonal net does not.",
        1.0,
        Tolerance.at_least(),
        _ORDER,
        "As relu.two-improves.",
    ),
    Claim(
        "relu.xavier-does-not",
        f"{_PAPER}, figure 10",
        "The deepest Xavier net does not.",
        1.0,
        Tolerance.at_least(),
        _ORDER,
        "As relu.two-improves.",
    ),
    Claim(
        "relu.best",
        f"{_PAPER}, figure 10",
        "The 2-shortcut net ends lower than both at every depth.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        f"Final loss: {_RATIO}, {_BEST}.",
    ),
    Claim(
        "relu.best-deep",
        f"{_PAPER}, figure 10",
        "It does at the largest depth.",
        1.0,
        Tolerance.less_than(),
        _ORDER,
        "As relu.best.",
    ),
]

CLAIMS = (*_check, *_start, *_loss, *_rate, *_norm, *_path, *_relu)
BY_ID = {claim.id: claim for claim in CLAIMS}
