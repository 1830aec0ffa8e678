"""Numbers of others, put beside what is measured; none of them decides a claim.

Those of the authors are read off saved figures in the history of their code. The earlier check ran
the same nets on two cores before this experiment was written; for independent weights with beta =
1/4 its means have a heavy tail.
"""

from __future__ import annotations

from collections.abc import Mapping

# Weights, beta -> {L: mean of |h_L - h_0| / |h_0|}.
EARLIER: Mapping[tuple[str, float], Mapping[int, float]] = {
    ("independent", 1.0): {10: 0.226, 1000: 0.0226},
    ("independent", 0.5): {10: 0.779, 120: 0.804, 340: 0.768, 670: 0.772, 1000: 0.804},
    ("independent", 0.25): {10: 1.84, 120: 13.3, 340: 82.0, 670: 524.0, 1000: 2088.0},
    ("smooth, increments", 2.0): {
        10: 0.0218, 120: 0.0017, 340: 0.0006, 670: 0.0003, 1000: 0.0002
    },
    ("smooth, increments", 1.0): {10: 0.218, 120: 0.198, 670: 0.209, 1000: 0.195},
    ("smooth, increments", 0.5): {10: 0.72, 120: 8.8, 340: 285.0, 670: 3.3e4, 1000: 3.1e6},
    ("smooth, process", 2.0): {10: 0.0315, 120: 0.0025, 340: 0.0009, 670: 0.0004, 1000: 0.0003},
    ("smooth, process", 1.0): {10: 0.314, 120: 0.302, 340: 0.308, 670: 0.297, 1000: 0.317},
    ("smooth, process", 0.5): {10: 1.15, 120: 51.0, 340: 1e4, 670: 1.4e6, 1000: 2.3e8},
}  # fmt: skip

# The same as the authors have it, where a single number can be read off.
AUTHORS: Mapping[tuple[str, float], Mapping[int, float]] = {
    ("independent", 1.0): {10: 0.23, 1000: 0.022},
    ("independent", 0.25): {1000: 2150.0},
    ("smooth, increments", 2.0): {10: 0.0205, 1000: 2e-4},
    ("smooth, increments", 0.5): {1000: 2.7e6},
}

# The critical beta of outputs at L = 1000, d = 40, by block and H; its noise is some 0.015.
CRITICAL: Mapping[str, Mapping[float, float]] = {
    "res-3": {
        0.05: 0.475, 0.2: 0.476, 0.35: 0.464, 0.5: 0.491, 0.6: 0.517, 0.7: 0.610, 0.8: 0.714,
        0.9: 0.803, 0.97: 0.898,
    },
    "res-1": {
        0.05: 0.160, 0.2: 0.207, 0.35: 0.314, 0.5: 0.474, 0.6: 0.583, 0.7: 0.686, 0.8: 0.766,
        0.9: 0.863, 0.97: 0.902,
    },
}  # fmt: skip
CRITICAL_DEPTH, WIDTH = 1000, 40
