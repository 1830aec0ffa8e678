"""What a checkup holds: frozen, every number with its error, ready for JSON and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conditioning.checkup.plain import from_plain, to_plain
from conditioning.checkup.readings import (
    ActivationReading,
    BlockReading,
    Finding,
    LayerReading,
    Missing,
    Prediction,
    RecurrentReading,
    Setting,
    SpectrumReading,
    StepSize,
)
from conditioning.errors import InvalidArgumentError
from conditioning.spectrum import Estimate
from conditioning.spectrum.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from conditioning.checkup.compare import Comparison

SCHEMA = 1
Completeness = Literal["complete", "out of budget", "interrupted"]


@dataclass(frozen=True)
class Checkup(Result):
    """Where a network loses the norm, and how badly its loss is conditioned.

    Made by :func:`conditioning.checkup`. ``print`` shows it as text, ``save`` writes JSON, HTML
    or text by the suffix of the path, ``scalars`` are for loggers, ``compare`` sets it beside
    another one.

    Attributes
    ----------
    setting : Setting
    status : {"complete", "out of budget", "interrupted"}
    loss, gradient_norm : Estimate
        Mean over the batches with the least and the largest; the norm is that of the gradient by
        all trainable parameters.
    product : Estimate
        Gradient norm at the input of the first block over that at the output of the last.
    mean_deviation : Estimate
        Mean over the blocks of ``|1 - ratio|``.
    nonfinite : str
        Where NaN or an infinity came up first; empty if nowhere.
    blocks : tuple of BlockReading
    activations : tuple of ActivationReading
    layers : tuple of LayerReading
    recurrent : tuple of RecurrentReading
    hessian, gauss_newton : SpectrumReading or None
    step_size : StepSize or None
    predictions : tuple of Prediction
    findings : tuple of Finding
        In order of weight, problems first.
    missing : tuple of Missing
        What was not certified or not measured, and why.
    seconds : dict of str to float
        Spent, by stage.
    num_matvecs : int
        Products with all operators together.
    """

    setting: Setting
    status: Completeness
    loss: Estimate
    gradient_norm: Estimate
    product: Estimate
    mean_deviation: Estimate
    nonfinite: str
    blocks: tuple[BlockReading, ...]
    activations: tuple[ActivationReading, ...]
    layers: tuple[LayerReading, ...]
    recurrent: tuple[RecurrentReading, ...]
    hessian: SpectrumReading | None
    gauss_newton: SpectrumReading | None
    step_size: StepSize | None
    predictions: tuple[Prediction, ...]
    findings: tuple[Finding, ...]
    missing: tuple[Missing, ...]
    seconds: dict[str, float]
    num_matvecs: int

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are problems, the weightiest first."""
        return tuple(finding for finding in self.findings if finding.severity == "problem")

    def to_json(self, indent: int | None = 1) -> str:
        """The whole checkup as JSON; numbers that are not finite are strings."""
        head = {"schema": SCHEMA}
        return json.dumps(head | to_plain(self), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Checkup:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        InvalidArgumentError
            If it is no checkup, or one of a newer schema.
        """
        try:
            plain = json.loads(text)
        except json.JSONDecodeError as error:
            msg = f"This is no JSON ({error}). Pass a file that Checkup.save('NAME.json') wrote."
            raise InvalidArgumentError(msg) from error
        found = plain.pop("schema", None) if isinstance(plain, dict) else None
        if found != SCHEMA:
            msg = (
                f"This is no checkup that this version can read (schema {found!r}, wanted "
                f"{SCHEMA}). Pass a file that Checkup.save('NAME.json') wrote."
            )
            raise InvalidArgumentError(msg)
        return from_plain(cls, plain)

    def to_html(self) -> str:
        """One self-contained page, figures included."""
        from conditioning.checkup.page import page

        return page(self)

    def save(self, path: str | Path) -> None:
        """Write it to a file: JSON, HTML or text, by the suffix.

        Raises
        ------
        InvalidArgumentError
            If the suffix is none of ``.json``, ``.html``, ``.htm`` and ``.txt``.
        """
        path = Path(path)
        writers = {
            ".json": self.to_json, ".html": self.to_html, ".htm": self.to_html,
            ".txt": self.__str__,
        }  # fmt: skip
        if path.suffix.lower() not in writers:
            msg = f"The suffix decides on the form: .json, .html or .txt, got {str(path)!r}."
            raise InvalidArgumentError(msg)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(writers[path.suffix.lower()]() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Checkup:
        """Read a JSON file that :meth:`save` wrote.

        Raises
        ------
        InvalidArgumentError
            If the file is no checkup.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def scalars(self, prefix: str = "checkup/") -> dict[str, float]:
        """The main numbers as a flat dict for any logger."""
        from conditioning.checkup.text import scalars

        return scalars(self, prefix)

    def compare(self, other: Checkup) -> Comparison:
        """Set this checkup (before) beside another one (after)."""
        from conditioning.checkup.compare import compare

        return compare(self, other)

    def to_frame(self) -> pd.DataFrame:
        """One row for each block: its norms, ratio, product, and the ends of its Jacobian."""
        from conditioning.checkup.text import frame

        return frame(self)

    def __str__(self) -> str:
        from conditioning.checkup.text import text

        return text(self)

    def _repr_html_(self) -> str:
        from conditioning.checkup.page import notebook

        return notebook(self)

    def __repr__(self) -> str:
        return (
            f"<Checkup of {self.setting.model}: {len(self.problems)} problems, "
            f"{len(self.findings)} findings, {self.status}>"
        )
