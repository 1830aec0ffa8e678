"""The networks of the gallery: what people write, in a few lines each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError
from experiments.models.initialise import fan_in
from experiments.models.residual_mlp import ResidualBranch


def set_gain_(model: nn.Module, gain: float) -> nn.Module:
    """Draw the weights of all linear and convolutional layers with a gain, biases zero.

    A layer has gain ``g`` if its weights have the standard deviation ``g / sqrt(fan_in)``.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in(module.weight)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def mlp(
    sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, *, norm: bool = False
) -> nn.Sequential:
    """Fully connected layers with activations between them; images are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else [])]
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def convnet(
    channels: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, *, norm: bool = False
) -> nn.Sequential:
    """3x3 convolutions with activations between them, the mean over pixels, a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels[:-1]):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *([nn.BatchNorm2d(outputs)] if norm else []),
            activation(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-2], channels[-1])
    )


class Tower(nn.Module):
    """A stem, blocks of two layers of one width with or without a skip, and a linear head.

    A block is ``[x +] scale * W2 act(W1 act(x))``, with normalisations in front of the
    activations if wished. Weights are those that torch draws.

    Parameters
    ----------
    width, num_blocks : int
    skip : bool
    activation : callable
        Makes a module.
    norm : bool
        Whether BatchNorm stands in front of every activation.
    conv : bool
        3x3 convolutions on images in place of linear layers on their pixels.
    branch_scale : float
    """

    def __init__(
        self,
        width: int,
        num_blocks: int,
        *,
        skip: bool,
        activation: Callable[[], nn.Module] = nn.ReLU,
        norm: bool = False,
        conv: bool = False,
        branch_scale: float = 1.0,
    ) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.Conv2d(width, width, 3, padding=1) if conv else nn.Linear(width, width)

        def act() -> list[nn.Module]:
            kind = nn.BatchNorm2d if conv else nn.BatchNorm1d
            return [*([kind(width)] if norm else []), activation()]

        stem = nn.Conv2d(1, width, 3, padding=1) if conv else nn.Linear(64, width)
        self.stem = nn.Sequential(stem) if conv else nn.Sequential(nn.Flatten(), stem)
        self.blocks = nn.ModuleList(
            ResidualBranch(
                nn.Sequential(*act(), layer(), *act(), layer()),
                skip=skip,
                branch_scale=branch_scale,
            )
            for _ in range(num_blocks)
        )
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if conv else []
        self.head = nn.Sequential(*act(), *pool, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(m, 1, 8, 8)`` to logits ``(m, 10)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class Narrowing(nn.Module):
    """A residual net without normalisation that halves its images on the way.

    Blocks are ``x + scale * conv(relu(conv(relu(x))))``; a transition has a 1x1 convolution of
    stride 2 on its skip and a branch of stride 2.

    Parameters
    ----------
    widths : sequence of int
        Channels of the stages; between two stages there is a transition.
    per_stage : int
        Identity blocks in each.
    norm : bool
        Whether BatchNorm stands behind the stem and in the branches.
    """

    def __init__(self, widths: Sequence[int], per_stage: int, *, norm: bool = False) -> None:
        super().__init__()
        scale = 1 / math.sqrt(len(widths) * (per_stage + 1))

        def act(channels: int) -> list[nn.Module]:
            return [*([nn.BatchNorm2d(channels)] if norm else []), nn.ReLU()]

        def block(inputs: int, outputs: int) -> ResidualBranch:
            stride = 1 if inputs == outputs else 2
            branch = nn.Sequential(
                *act(inputs),
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
                *act(outputs),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            )
            skip = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False) if stride == 2 else None
            return ResidualBranch(branch, branch_scale=scale, projection=skip)

        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        stages = [
            [block(before, width)] * (before != width)
            + [block(width, width) for _ in range(per_stage)]
            for before, width in zip([widths[0], *widths[:-1]], widths, strict=True)
        ]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.head = nn.Sequential(
            *act(widths[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
        )
        set_gain_(self, math.sqrt(2))
        for module in self.modules():
            if isinstance(module, ResidualBranch) and isinstance(module.projection, nn.Conv2d):
                balance_(module.projection)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(m, 1, height, width)`` to logits ``(m, 10)``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x)
        return logits


def balance_(layer: nn.Conv2d, *, rank: int | None = None, scale: float = 1.0) -> None:
    """Give a convolution a kernel matrix with all singular values ``scale * sqrt(c_out / c_in)``.

    Parameters
    ----------
    layer : nn.Conv2d
    rank : int, optional
        How many singular values are kept; the others become zero.
    scale : float
    """
    outputs, inputs = layer.weight.shape[:2]
    most = min(outputs, inputs)
    kept = most if rank is None else rank
    if not 0 <= kept <= most:
        msg = f"rank must be from 0 to {most}, got {rank}."
        raise InvalidArgumentError(msg)
    with torch.no_grad():
        matrix = layer.weight.flatten(1)
        nn.init.orthogonal_(matrix, math.sqrt(outputs / most))
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values[kept:] = 0
        layer.weight.copy_(((left * values) @ right * scale).reshape(layer.weight.shape))


class Recurrent(nn.Module):
    """A linear embedding, a recurrent layer, and a linear layer on its last step.

    Parameters
    ----------
    layer : nn.RNN, nn.LSTM or nn.GRU
        With the batch first.
    features, classes : int
    """

    def __init__(self, layer: nn.RNNBase, features: int, classes: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, layer.input_size)
        self.rnn = layer
        self.head = nn.Linear(layer.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(m, steps, features)`` to ``(m, classes)``."""
        states, _ = self.rnn(self.embedding(x))
        logits: Tensor = self.head(states[:, -1])
        return logits


def set_recurrent_(layer: nn.Module, gain: float) -> None:
    """Orthogonal recurrent weights, gate by gate, times a gain; biases zero."""
    for name, weight in layer.named_parameters():
        if "weight_hh" in name:
            for gate in weight.data.split(weight.shape[1]):
                nn.init.orthogonal_(gate, gain)
        elif "bias" in name:
            nn.init.zeros_(weight)


class CellLoop(nn.Module):
    """The same with a cell in a loop over the steps."""

    def __init__(self, cell: nn.RNNCell, classes: int = 4) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(m, steps, features)`` to ``(m, classes)``."""
        state = x.new_zeros(len(x), self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        logits: Tensor = self.head(state)
        return logits


class LanguageModel(nn.Module):
    """Pre-norm transformer blocks; the weights of the embedding serve as those of the head.

    Parameters
    ----------
    vocabulary, width, num_layers, num_heads : int
    tied : bool
        Whether embedding and head share their weights.
    """

    def __init__(
        self, vocabulary: int, width: int, num_layers: int, num_heads: int = 4, *, tied: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 2 * width, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """Map tokens ``(m, steps)`` to logits ``(m, vocabulary, steps)``."""
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits.transpose(1, 2)


class Autoencoder(nn.Module):
    """Convolutions that halve an image twice, and transposed ones back."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(m, 1, height, width)`` to images."""
        image: Tensor = self.decoder(self.encoder(x))
        return image
