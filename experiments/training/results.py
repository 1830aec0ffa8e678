"""What a training tells: its steps, its evaluations, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """What a callback is told after an optimizer step."""

    index: int
    """Counted from 0."""
    epoch: int
    """Counted from 0."""
    loss: float
    """Of the batch, before the step; on several ranks, of the batches of all of them."""
    lr: float
    skipped: bool = False
    """Whether the gradients overflowed in float16, so that nothing was changed."""


@dataclass(frozen=True)
class Evaluation:
    """How good the model was, in evaluation mode, on data that it is not trained on.

    Parameters
    ----------
    step : int
        Steps done before.
    epoch : int
        Whole epochs done before.
    loss : float
        Mean over the samples.
    error : float
        Share of wrong answers.
    """

    step: int
    epoch: int
    loss: float
    error: float


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Parameters
    ----------
    status : {"finished", "diverged"}
        A diverged model is left as the last step made it.
    num_steps : int
        Steps done.
    losses : tuple of float
        Of the batches, each before its step. The last one of a diverged training is what ended
        it, unless the parameters themselves stopped being finite.
    message : str
        Where and how a training diverged; empty if it did not.
    evaluations : tuple of Evaluation
        In the order in which they were made; empty without data for them.
    num_skipped : int
        Of the steps done, those whose gradients overflowed in float16: they used up their batch
        and their place in the schedule, and changed nothing.
    """

    status: Literal["finished", "diverged"]
    num_steps: int
    losses: tuple[float, ...]
    message: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    num_skipped: int = 0

    @property
    def final_error(self) -> float | None:
        """Error after the last step; None if it diverged or was not evaluated there."""
        if self.status == "diverged" or not self.evaluations:
            return None
        last = self.evaluations[-1]
        return last.error if last.step == self.num_steps else None

    @property
    def best_error(self) -> float | None:
        """Least error of any evaluation; None if there was none."""
        return min((one.error for one in self.evaluations), default=None)
