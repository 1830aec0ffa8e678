"""Procrustes regularisation: layers whose singular values are kept equal while a model trains."""

from conditioning.procrustes.isometric import IsometricDownsample
from conditioning.procrustes.regulariser import Procrustes
from conditioning.procrustes.report import LayerReport, ProcrustesReport

__all__ = ["IsometricDownsample", "LayerReport", "Procrustes", "ProcrustesReport"]
