"""Named errors and warnings. Every text says what was found and what to do about it.

Each class also derives from the built-in exception that fits, so that callers
who know only ``ValueError`` or ``RuntimeError`` catch what they expect.
"""

from __future__ import annotations


class ConditioningError(Exception):
    """Base class of every error that this package raises on purpose."""


class InvalidArgumentError(ConditioningError, ValueError):
    """An option is outside the range for which the result has a meaning."""


class ShapeError(ConditioningError, ValueError):
    """A vector, matrix or start block does not fit the operator's shape."""


class NonFiniteError(ConditioningError, ValueError):
    """A loss, gradient or product contains NaN or an infinity."""


class NonScalarLossError(ConditioningError, ValueError):
    """The loss is not one real number."""


class LossWithoutGraphError(ConditioningError, RuntimeError):
    """The loss does not depend on the parameters through autograd."""


class NoTrainableParametersError(ConditioningError, ValueError):
    """No parameter requires a gradient."""


class ParameterSelectionError(ConditioningError, ValueError):
    """``params`` names, matches or holds nothing that the model owns."""


class UnsupportedParameterError(ConditioningError, TypeError):
    """A parameter is integer, complex, sparse, or sharded."""


class MixedDevicesError(ConditioningError, ValueError):
    """Parameters, or parameters and data, live on different devices."""


class MixedDtypesError(ConditioningError, TypeError):
    """The data's dtype and the parameters' dtype cannot be multiplied."""


class EmptyDataError(ConditioningError, ValueError):
    """The data holds no batch, or a batch holds no sample."""


class OneShotDataError(ConditioningError, TypeError):
    """The data is a generator or iterator: a second product would see nothing."""


class BatchFormatError(ConditioningError, TypeError):
    """A batch is not of the form the operator was told to expect."""


class RandomForwardError(ConditioningError, RuntimeError):
    """Two evaluations of the same loss disagree: there is randomness in the forward pass."""


class BatchNormTrainingError(RandomForwardError):
    """A normalisation layer is in training mode, so the forward pass rewrites its buffers."""


class DoubleBackwardError(ConditioningError, RuntimeError):
    """An operation in the model has no second derivative in autograd."""


class CompiledModelError(DoubleBackwardError):
    """The model went through ``torch.compile``, which supports one backward pass only."""


class AsymmetricOperatorError(ConditioningError, RuntimeError):
    """<u, A v> and <v, A u> differ by more than rounding, so A is not a symmetric operator."""


class DenseTooLargeError(ConditioningError, MemoryError):
    """The dense matrix does not fit the memory budget."""


class BlockSelectionError(ConditioningError, ValueError):
    """``blocks`` names or matches nothing in the model, or no block can be found in it."""


class UnsupportedLayerError(ConditioningError, TypeError):
    """A layer whose weight does not say what it computes, or one of another kind."""


class LayerSelectionError(ConditioningError, ValueError):
    """A name or pattern matches no layer, or no transition layer was found."""


class ParametrizedWeightError(ConditioningError, TypeError):
    """The weight of a layer is computed from other parameters, so it cannot be set."""


class RankDeficientWeightError(ConditioningError, ValueError):
    """A weight has singular values that are zero to rounding: its polar factor is not unique."""


class OptimizerMismatchError(ConditioningError, ValueError):
    """An optimizer does not own a weight that is to be changed after its steps."""


class HooksNotFiredError(ConditioningError, RuntimeError):
    """No tracked block ran in a step: compiled before tracking, unused, or without gradients."""


class NoBackwardError(ConditioningError, RuntimeError):
    """A step was closed, but no gradient arrived at any tracked block."""


class TrackerActiveError(ConditioningError, RuntimeError):
    """A tracker was started while it was already running."""


class RankMismatchError(ConditioningError, RuntimeError):
    """The ranks of a distributed run did not do the same things, or one of them failed."""


class ObjectNotFoundError(ConditioningError, ImportError):
    """The command line was given a module, a file or a name that cannot be imported."""


class FactoryError(ConditioningError, TypeError):
    """A factory needs arguments, failed, or returned something else than a model or data."""


class CheckpointError(ConditioningError, ValueError):
    """A checkpoint cannot be read, needs code to be read, or does not fit the model."""


class ExaminationError(ConditioningError, RuntimeError):
    """The model or its loss raised an error of its own while it was examined."""


class DataFileError(ConditioningError, ValueError):
    """A data file cannot be read, or does not hold inputs and targets."""


class OutputPathError(ConditioningError, OSError):
    """A file that is to be written cannot be."""


class ConditioningWarning(UserWarning):
    """Base class of every warning that this package issues on purpose."""


class UnusedParameterWarning(ConditioningWarning):
    """A selected parameter does not influence the loss: its rows of the Hessian are zero."""


class MixedDtypeWarning(ConditioningWarning):
    """The selected parameters have several dtypes: products are as good as the coarsest."""


class LargeGraphWarning(ConditioningWarning):
    """The graph of a batch may not fit in memory, and cannot be held in parts."""


class NonsmoothPointWarning(ConditioningWarning):
    """The parameters sit on a kink, where autograd's second derivative is a convention."""


class NonFiniteGradientWarning(ConditioningWarning):
    """A gradient or an activation became NaN or infinite; says in which block first."""


class BlockNotSeenWarning(ConditioningWarning):
    """A tracked block did not run, or no gradient passed through it."""
