"""Small networks of every style that is in use: each a function that returns (model, inputs).

All are in float64 and in training mode. ``inputs`` is what the model takes: a tensor, a tuple of
positional arguments, or a dict of keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Any]


def _images(channels: int = 3, side: int = 8, batch: int = 4) -> Tensor:
    return torch.randn(batch, channels, side, side).double()


def _tokens(batch: int = 3, length: int = 5, vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length))


def _conv(c_in: int, c_out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)


# ---- convolutional residual nets ------------------------------------------------------------


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), as a rule with a projection where shapes change."""

    def __init__(
        self, c_in: int, c_out: int, stride: int = 1, *, norm: bool = True, inplace: bool = False
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in) if norm else nn.Identity()
        self.conv1 = _conv(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.conv2 = _conv(c_out, c_out)
        self.relu = nn.ReLU(inplace=inplace)
        same = stride == 1 and c_in == c_out
        self.shortcut = None if same else _conv(c_in, c_out, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        # Without normalisation an in-place ReLU would work on the block's own input.
        out = F.relu(out) if out is x else self.relu(out)
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.relu(self.bn2(self.conv1(out))))
        return skip + out


class PostActBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), written with functions."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = _conv(c_out, c_out), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(_conv(c_in, c_out, stride, 1), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class BasicBlock(nn.Module):
    """The layout of torchvision's: ``downsample``, ``out += identity``, ReLU in place."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = _conv(inplanes, planes, stride), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(planes, planes), nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        width = planes * self.expansion
        self.conv1, self.bn1 = _conv(inplanes, planes, kernel=1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, width, kernel=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TorchvisionLayout(nn.Module):
    """conv1, bn1, relu, maxpool, layer1 to layer4, avgpool, fc."""

    def __init__(self, block: Any, depths: tuple[int, ...] = (2, 2, 1, 1)) -> None:
        super().__init__()
        self.inplanes = 4
        self.conv1, self.bn1 = _conv(3, 4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=1, padding=1)
        for i, (planes, depth) in enumerate(zip((4, 6, 8, 8), depths, strict=True)):
            setattr(self, f"layer{i + 1}", self._stage(block, planes, depth, 1 if i == 0 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, 3)

    def _stage(self, block: Any, planes: int, depth: int, stride: int) -> nn.Sequential:
        width, downsample = planes * block.expansion, None
        if stride != 1 or self.inplanes != width:
            downsample = nn.Sequential(
                _conv(self.inplanes, width, stride, 1), nn.BatchNorm2d(width)
            )
        blocks = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = width
        blocks += [block(width, planes, 1, None) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class StageNet(nn.Module):
    """A stem, stages as Sequentials in a ModuleList, a head."""

    def __init__(self, stages: list[nn.Sequential], width: int, stem: int = 4) -> None:
        super().__init__()
        self.stem = _conv(3, stem)
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.head(x))


def _preact(*, norm: bool = True, inplace: bool = False) -> Made:
    def block(c_in: int, c_out: int, stride: int = 1) -> PreActBlock:
        return PreActBlock(c_in, c_out, stride, norm=norm, inplace=inplace)

    stages = [
        nn.Sequential(block(4, 4), block(4, 4)),
        nn.Sequential(block(4, 6, 2), block(6, 6)),
    ]
    return StageNet(stages, 6).double(), _images()


def preact_resnet() -> Made:
    return _preact()


def preact_resnet_inplace() -> Made:
    return _preact(inplace=True)


def preact_resnet_without_norm() -> Made:
    return _preact(norm=False)


def postact_resnet() -> Made:
    stages = [
        nn.Sequential(PostActBlock(4, 4), PostActBlock(4, 4)),
        nn.Sequential(PostActBlock(4, 6, 2), PostActBlock(6, 6)),
    ]
    return StageNet(stages, 6).double(), _images()


def torchvision_layout() -> Made:
    return TorchvisionLayout(BasicBlock).double(), _images()


def bottleneck_resnet() -> Made:
    return TorchvisionLayout(Bottleneck).double(), _images()


def procrustes_layout() -> Made:
    """Identity blocks only; between the stages one bare strided 1x1 convolution."""
    stages = [
        nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4), _conv(4, 8, 2, 1)),
        nn.Sequential(PreActBlock(8, 8), PreActBlock(8, 8)),
    ]
    return StageNet(stages, 8).double(), _images()


class _BareTransitions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 4)
        self.stage1 = nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4))
        self.transition1 = _conv(4, 8, 2, 1)
        self.stage2 = nn.Sequential(PreActBlock(8, 8), PreActBlock(8, 8))
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.transition1(self.stage1(self.stem(x))))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


def bare_transition_attribute() -> Made:
    return _BareTransitions().double(), _images()


class InplaceFirst(nn.Module):
    """Its first operation rectifies the previous block's output in place, skip included."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.relu1, self.conv1 = nn.ReLU(inplace=True), _conv(channels, channels)
        self.relu2, self.conv2 = nn.ReLU(inplace=True), _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu2(self.conv1(self.relu1(x))))


def inplace_relu_first() -> Made:
    stages = [nn.Sequential(*(InplaceFirst(4) for _ in range(3)))]
    return StageNet(stages, 4).double(), _images()


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 4)
        self.body = nn.Sequential(
            nn.Sequential(nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4)), PreActBlock(4, 4)),
            nn.Sequential(PreActBlock(4, 6, 2), nn.Sequential(PreActBlock(6, 6))),
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def nested_stages() -> Made:
    return _Nested().double(), _images()


class ScaledBlock(nn.Module):
    """ConvNeXt's: depthwise convolution, LayerNorm, two linears, layer scale, stochastic depth."""

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.reduce = nn.Linear(channels, 8), nn.Linear(8, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        branch = self.gamma * self.reduce(F.gelu(self.expand(branch)))
        branch = branch.permute(0, 3, 1, 2)
        if self.training and self.drop > 0:
            keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device) >= self.drop
            branch = branch * keep / (1 - self.drop)
        return x + branch


def convnext() -> Made:
    stages = [
        nn.Sequential(*(ScaledBlock(4, 0.2) for _ in range(3))),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, stride=2), ScaledBlock(6, 0.2)),
    ]
    return StageNet(stages, 6).double(), _images()


# ---- without shortcuts, and with others ------------------------------------------------------


def plain_mlp() -> Made:
    layers: list[nn.Module] = [nn.Linear(3, 5), nn.Tanh()]
    for _ in range(4):
        layers += [nn.Linear(5, 5), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(5, 2)).double(), torch.randn(6, 3).double()


class _Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for c_out in (4, 4, "pool", 6, 6, "pool"):
            if c_out == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [_conv(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(24, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg() -> Made:
    return _Vgg().double(), _images()


class _DenseLayer(nn.Module):
    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c_in), _conv(c_in, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


def densenet() -> Made:
    stages = [
        nn.Sequential(_DenseLayer(4, 2), _DenseLayer(6, 2), _conv(8, 4, 1, 1), nn.AvgPool2d(2)),
        nn.Sequential(_DenseLayer(4, 2), _DenseLayer(6, 2)),
    ]
    return StageNet(stages, 8).double(), _images()


class _DoubleConv(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(c_in, c_out), _conv(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_DoubleConv(3, 4), _DoubleConv(4, 6)])
        self.middle = _DoubleConv(6, 6)
        self.grow = nn.ModuleList(
            [nn.ConvTranspose2d(6, 6, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=2)]
        )
        self.up = nn.ModuleList([_DoubleConv(12, 4), _DoubleConv(8, 4)])
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), kept.pop()], dim=1))
        return self.out(x)


def unet() -> Made:
    return _UNet().double(), _images()


def autoencoder() -> Made:
    encoder = nn.Sequential(_conv(3, 4, 2), nn.ReLU(), _conv(4, 6, 2), nn.ReLU())
    decoder = nn.Sequential(
        nn.ConvTranspose2d(6, 4, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, stride=2)
    )
    return nn.Sequential(encoder, decoder).double(), _images()


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> Made:
    return _Recurrent().double(), torch.randn(4, 5, 3).double()


# ---- residual nets of linear layers ----------------------------------------------------------


class MlpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class _ResidualMlp(nn.Module):
    def __init__(self, depth: int = 4, *, shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        blocks = [MlpBlock(5)] if shared else [MlpBlock(5) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.calls = depth
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(self.calls):
            x = self.blocks[i % len(self.blocks)](x)
        return self.head(x)


def residual_mlp() -> Made:
    return _ResidualMlp().double(), torch.randn(6, 3).double()


def shared_block() -> Made:
    """One block, called four times in a forward pass."""
    return _ResidualMlp(shared=True).double(), torch.randn(6, 3).double()


class _OwnAdditions(nn.Module):
    """Additions in the model's own loop: the blocks are branches without a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3)
        )
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def additions_in_the_model() -> Made:
    return _OwnAdditions().double(), torch.randn(6, 3).double()


# ---- transformers ---------------------------------------------------------------------------


def _encoder(*, norm_first: bool) -> Made:
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, dropout=0.1, batch_first=True, norm_first=norm_first, activation="gelu"
    )
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model.double(), torch.randn(3, 5, 4).double()


def encoder_postnorm() -> Made:
    return _encoder(norm_first=False)


def encoder_prenorm() -> Made:
    return _encoder(norm_first=True)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2)), parts[1]


class BlockOutput(NamedTuple):
    hidden: Tensor
    keys: Tensor


class GptBlock(nn.Module):
    """Two additions; returns a tuple, a named tuple or a dict."""

    def __init__(self, width: int, returns: str) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.returns = returns

    def forward(self, hidden: Tensor, *, scale: float = 1.0) -> Any:
        attended, keys = self.attention(self.norm1(hidden))
        hidden = hidden + scale * attended
        hidden = hidden + self.mlp(self.norm2(hidden))
        if self.returns == "dict":
            return {"hidden": hidden, "keys": keys}
        return (hidden, keys) if self.returns == "tuple" else BlockOutput(hidden, keys)


class _Gpt(nn.Module):
    def __init__(self, returns: str, width: int = 4, vocabulary: int = 11) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(GptBlock(width, returns) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            output = block(hidden=hidden)
            hidden = output["hidden"] if isinstance(output, dict) else output[0]
        return {"logits": self.head(self.norm(hidden))}


def gpt_tuples() -> Made:
    return _Gpt("tuple").double(), {"tokens": _tokens()}


def gpt_dicts() -> Made:
    return _Gpt("dict").double(), {"tokens": _tokens()}


def gpt_named_tuples() -> Made:
    return _Gpt("named tuple").double(), _tokens()


#: Every network here by name.
ZOO: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        preact_resnet, preact_resnet_inplace, preact_resnet_without_norm, postact_resnet,
        torchvision_layout, bottleneck_resnet, procrustes_layout, bare_transition_attribute,
        inplace_relu_first, nested_stages, convnext,
        plain_mlp, vgg, densenet, unet, autoencoder, lstm,
        residual_mlp, shared_block, additions_in_the_model,
        encoder_postnorm, encoder_prenorm, gpt_tuples, gpt_dicts, gpt_named_tuples,
    )
}  # fmt: skip
