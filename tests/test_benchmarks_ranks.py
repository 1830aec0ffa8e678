"""The share of communication is taken round by round, against a rank by itself."""

from __future__ import annotations

import pytest

from benchmarks.ranks import VARIANTS, _summary, _text


def test_shares_are_of_one_round():
    # The machine is twice as slow in every second round: shares do not see that.
    alone = [1.0, 2.0, 1.0, 2.0]
    times = {
        name: [t * factor for t in alone]
        for name, factor in zip(VARIANTS, (1, 1.25, 2, 4), strict=True)
    }
    found = _summary({"seconds": times, "processor": times, "latency": 1e-3})
    shares = [found[name]["seconds"]["share"] for name in VARIANTS]
    assert shares == pytest.approx([0, 0.2, 0.5, 0.75])
    assert found["sharded"]["processor"]["milliseconds"] == pytest.approx(6000)
    text = _text("net", 2, 4, found)
    assert "1.00 ms" in text
    assert "75.0% [75.0%, 75.0%]" in text
