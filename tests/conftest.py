"""Models, losses and data that the operators are tested on, and dense references for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

# Small problems: a second thread costs more than it gives.
torch.set_num_threads(1)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers that are read from tensors."""

    READS = "_local_scalar_dense", "is_nonzero", "nonzero", "equal"

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function, *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class TiedLanguageModel(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class TwoInputs(nn.Module):
    """Takes keywords and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.left(a)) * torch.sigmoid(self.right(b))
        return {"hidden": hidden, "logits": self.head(hidden)}


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Linear(3, 4).float()
        self.fine = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fine(torch.tanh(self.coarse(x.float())).double())


class ZeroBranch(nn.Module):
    """A residual block whose branch has zero weights."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.activation = activation
        self.outer = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.activation(self.inner(x)))


def small_mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def regression(samples: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3).double(), torch.randn(samples, 2).double()


@dataclass
class Problem:
    """What an operator is made of."""

    model: Any
    loss_fn: Callable[..., Tensor]
    batch: tuple[Any, Any]
    params: Any = None


def _frozen() -> Problem:
    model = small_mlp()
    model[0].weight.requires_grad_(False)
    return Problem(model, nn.MSELoss(), regression())


def _cnn() -> Problem:
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double().eval()
    model[1].running_mean.normal_()
    images = torch.randn(5, 1, 4, 4).double()
    return Problem(model, nn.CrossEntropyLoss(), (images, torch.tensor([0, 1, 2, 0, 1])))


def _transformer() -> Problem:
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    sequences = torch.randn(3, 3, 4).double()
    return Problem(model, nn.MSELoss(), (sequences, torch.randn(3, 3, 4).double()))


def _two_inputs() -> Problem:
    inputs = {"a": torch.randn(5, 3).double(), "b": torch.randn(5, 2).double()}

    def loss_fn(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        extra = outputs["hidden"].square().mean()
        return nn.functional.cross_entropy(outputs["logits"], targets) + extra

    return Problem(TwoInputs().double(), loss_fn, (inputs, torch.tensor([0, 1, 1, 0, 1])))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": lambda: Problem(small_mlp(), nn.MSELoss(), regression()),
    "cnn": _cnn,
    "tied": lambda: Problem(
        TiedLanguageModel().double(),
        nn.CrossEntropyLoss(),
        (torch.randint(0, 7, (4, 3)), torch.randint(0, 7, (4, 3))),
    ),
    "lstm": lambda: Problem(
        Recurrent().double(),
        nn.MSELoss(),
        (torch.randn(4, 3, 3).double(), torch.randn(4, 2).double()),
    ),
    "transformer": _transformer,
    "two_inputs": _two_inputs,
    "frozen": _frozen,
    "unused": lambda: Problem(WithUnused().double(), nn.MSELoss(), regression()),
    "linear_loss": lambda: Problem(
        nn.Linear(3, 2).double(), lambda outputs, _: outputs.sum(), regression()
    ),
    "mixed_dtypes": lambda: Problem(MixedDtypes(), nn.MSELoss(), regression()),
    "subset": lambda: Problem(small_mlp(), nn.MSELoss(), regression(), params="2.*"),
}


WARNINGS = {"unused": "UnusedParameterWarning", "mixed_dtypes": "MixedDtypeWarning"}


def _marked(name: str) -> Any:
    expected = WARNINGS.get(name)
    mark = pytest.mark.filterwarnings(f"ignore::conditioning.errors.{expected}")
    return pytest.param(name, marks=mark if expected else ())


@pytest.fixture(params=[_marked(name) for name in PROBLEMS])
def problem(request: pytest.FixtureRequest) -> Problem:
    torch.manual_seed(0)
    return PROBLEMS[request.param]()


@pytest.fixture
def mlp_problem() -> Problem:
    torch.manual_seed(0)
    return PROBLEMS["mlp"]()


def selected(problem: Problem) -> list[Tensor]:
    """The parameters that an operator on the problem should act on."""
    if problem.params == "2.*":
        return list(problem.model[2].parameters())
    return [p for p in problem.model.parameters() if p.requires_grad]


def outputs_of(problem: Problem) -> Any:
    inputs, _ = problem.batch
    return problem.model(**inputs) if isinstance(inputs, dict) else problem.model(inputs)


def _rows(outputs: Tensor, inputs: list[Tensor], *, dtype: torch.dtype) -> Tensor:
    """Derivative of a flat tensor by some tensors, row by row."""
    rows = []
    for entry in outputs.reshape(-1):
        parts = (
            torch.autograd.grad(entry, inputs, retain_graph=True, materialize_grads=True)
            if entry.requires_grad
            else [torch.zeros_like(p) for p in inputs]
        )
        rows.append(torch.cat([part.reshape(-1).to(dtype) for part in parts]))
    return torch.stack(rows)


def dense_hessian(problem: Problem) -> Tensor:
    """The Hessian, row by row from a fresh graph, in the order of ``parameters()``."""
    parameters = selected(problem)
    with sdpa_kernel(SDPBackend.MATH):
        loss = problem.loss_fn(outputs_of(problem), problem.batch[1])
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1).double() for g in gradient])
        return _rows(flat, parameters, dtype=torch.float64)


def dense_gauss_newton(problem: Problem) -> Tensor:
    """``J^T H_L J`` from the Jacobian row by row and the loss's own Hessian."""
    parameters = selected(problem)
    with sdpa_kernel(SDPBackend.MATH):
        outputs = outputs_of(problem)
        tree = outputs if isinstance(outputs, dict) else {"only": outputs}
        jacobian = torch.cat([_rows(t, parameters, dtype=torch.float64) for t in tree.values()])
    sizes = [t.numel() for t in tree.values()]
    shapes = [t.shape for t in tree.values()]

    def loss_of(flat: Tensor) -> Tensor:
        parts = {
            name: part.reshape(shape)
            for name, part, shape in zip(tree, flat.split(sizes), shapes, strict=True)
        }
        return problem.loss_fn(
            parts if isinstance(outputs, dict) else parts["only"], problem.batch[1]
        )

    point = torch.cat([t.detach().reshape(-1) for t in tree.values()])
    curvature = torch.autograd.functional.hessian(loss_of, point)
    return jacobian.T @ curvature @ jacobian


class Snapshot:
    """Everything that an operator has to leave as it was, bit by bit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        tensors = {}
        for name, p in self._model.named_parameters():
            tensors[f"{name}.data"] = p.detach().clone()
            tensors[f"{name}.grad"] = None if p.grad is None else p.grad.clone()
        tensors |= {name: b.clone() for name, b in self._model.named_buffers()}
        identities = [id(t) for t in (*self._model.parameters(), *self._model.buffers())]
        identities += [t.data_ptr() for t in (*self._model.parameters(), *self._model.buffers())]
        return {
            "tensors": tensors,
            "identities": identities,
            "modes": [m.training for m in self._model.modules()],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1:3],
            "python": random.getstate(),
            "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "attention": (
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
            ),
        }

    def assert_unchanged(self) -> None:
        after = self._read()
        for name, tensor in self._before.pop("tensors").items():
            now = after["tensors"].pop(name)
            if tensor is None:
                assert now is None, name
            else:
                assert torch.equal(tensor, now), name
        assert not after.pop("tensors")
        assert torch.equal(self._before.pop("torch"), after.pop("torch"))
        old, new = self._before.pop("numpy"), after.pop("numpy")
        assert np.array_equal(old[0], new[0])
        assert old[1] == new[1]
        assert self._before == after
