"""Findings: filled in next."""

from __future__ import annotations

from conditioning.checkup.readings import Finding
from conditioning.checkup.results import Checkup


def find(report: Checkup) -> tuple[Finding, ...]:
    """Nothing yet."""
    return ()
