"""A step as text."""

from __future__ import annotations

from collections.abc import Sequence

from conditioning.norms.history import BlockLabel, StepRecord, first_nonfinite, gaps, points

_COLUMNS = ("block", "kind", "act_in", "act_out", "grad_in", "grad_out", "ratio", "product")


def step_table(records: Sequence[StepRecord], labels: Sequence[BlockLabel]) -> str:
    """Write the last step block by block, and below it what a reader must not miss.

    A dash is a quantity that there is none of; ``nan`` is one that is not a number.
    """
    import pandas as pd

    found = points(records[-1], labels)
    rows = [{"block": p.name, "kind": p.kind, **p.values} for p in found]
    columns = [column for column in _COLUMNS if any(column in row for row in rows)]
    cells = []
    for row in rows:
        # A quotient without its parts is missing, not undefined.
        known = {**row}
        if "grad_in" not in row or "grad_out" not in row:
            known.pop("ratio", None)
        if "grad_in" not in row:
            known.pop("product", None)
        values = [known.get(column, "-") for column in columns]
        cells.append([f"{v:.4g}" if isinstance(v, float) else v for v in values])
    lines = [f"step {records[-1].step}, {len(records)} sampled"]
    lines.append(pd.DataFrame(cells, columns=columns).to_string(index=False))
    lines += [
        f"between {one} and {two} the gradient norm changes by {factor:.4g} outside of blocks"
        for one, two, factor in gaps(found)
    ]
    trouble = first_nonfinite(records, labels)
    lines += [trouble.message] if trouble else []
    return "\n".join(lines)
