"""Residual networks written in the less usual ways that libraries write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Made = tuple[nn.Module, Any]


def _linear() -> nn.Linear:
    return nn.Linear(5, 5)


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1)


def chain(
    forward: Callable[[Any, Tensor], Tensor], depth: int = 3, **parts: Callable[[], Any]
) -> Made:
    """A stem, blocks of one class with these parts and this forward, a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, make in parts.items():
                setattr(self, name, make())

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    layers = [_linear(), *(Block() for _ in range(depth)), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double(), torch.randn(6, 5).double()


def _highway(block: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(block.gate(x))
    return gate * block.a(x) + (1 - gate) * x


def _parallel_after_norm(block: Any, x: Tensor) -> Tensor:
    h = block.norm(x)
    return block.a(h) + x + block.b(h)


def _macaron(block: Any, x: Tensor) -> Tensor:
    x = x + 0.5 * block.a(x)
    x = x + block.b(x)
    return block.norm(x + 0.5 * block.c(x))


def _through_views(block: Any, x: Tensor) -> Tensor:
    out = block.a(x)
    out.view(-1).add_(x.reshape(-1))
    return out


def _overwriting(block: Any, x: Tensor) -> Tensor:
    out, more = x + block.a(x), block.b(x)
    x.zero_()
    return out + more


def _layer_between(block: Any, x: Tensor) -> Tensor:
    x = block.b(x + block.a(x))
    return x + block.c(x)


def _shifted(block: Any, x: Tensor) -> Tensor:
    """The second branch mixes its input with that of the sample before, and the first's output."""
    mixed = block.a(x)
    x = x + mixed
    shifted = x.roll(1, 0)
    shifted[0] = mixed[0]
    return x + block.b(0.3 * x + 0.7 * shifted)


def _gain() -> nn.Parameter:
    return nn.Parameter(torch.ones(5))


#: A block's forward, its parts, and what is to be found: kind and note.
BLOCKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], str, str]] = {
    "two branches": (
        lambda m, x: x + m.a(x) + m.b(x), {"a": _linear, "b": _linear}, "identity", "",
    ),
    "two branches after a norm": (
        _parallel_after_norm,
        {"a": _linear, "b": _linear, "norm": lambda: nn.LayerNorm(5)},
        "identity", "",
    ),
    "scaled skip": (lambda m, x: 0.7 * x + m.a(x), {"a": _linear}, "identity", "skip times 0.7"),
    "scaled sum": (lambda m, x: (x + m.a(x)) / 2**0.5, {"a": _linear}, "identity", ""),
    "alpha": (
        lambda m, x: torch.add(m.a(x), x, alpha=0.5), {"a": _linear}, "identity", "skip times 0.5",
    ),
    "learned scalar gain": (
        lambda m, x: x + m.g * m.a(x),
        {"a": _linear, "g": lambda: nn.Parameter(torch.zeros(1))},
        "identity", "",
    ),
    "gain for each channel of the skip": (
        lambda m, x: m.g * x + m.a(x), {"a": _linear, "g": _gain}, "transition", "skip through mul",
    ),
    "subtraction": (lambda m, x: x - m.a(x), {"a": _linear}, "identity", ""),
    "fused product": (
        lambda m, x: torch.addcmul(x, m.g, m.a(x)), {"a": _linear, "g": _gain}, "identity", "",
    ),
    "fused matrix product": (
        lambda m, x: torch.addmm(x, torch.relu(x), m.a.weight), {"a": _linear}, "identity", "",
    ),
    "sum of a list": (lambda m, x: sum([x, m.a(x)]), {"a": _linear}, "identity", ""),
    "in place on the input": (lambda m, x: x.add_(m.a(x)), {"a": _linear}, "identity", ""),
    "input overwritten": (_overwriting, {"a": _linear, "b": _linear}, "identity", ""),
    "scaled by a number that depends on the input": (
        lambda m, x: torch.sigmoid(m.g(x).mean()) * x + m.a(x),
        {"a": _linear, "g": _linear},
        "transition", "skip through",
    ),
    "a layer between additions": (
        _layer_between, {"a": _linear, "b": _linear, "c": _linear},
        "transition", "a layer after an addition; 2 additions",
    ),
    "shifted features": (_shifted, {"a": _linear, "b": _linear}, "identity", "2 additions"),
    "through views": (_through_views, {"a": _linear}, "identity", ""),
    "copy": (lambda m, x: x.clone() + m.a(x), {"a": _linear}, "identity", ""),
    "highway": (_highway, {"a": _linear, "gate": _linear}, "transition", "skip through"),
    "three additions": (
        _macaron,
        {"a": _linear, "b": _linear, "c": _linear, "norm": lambda: nn.LayerNorm(5)},
        "identity", "3 additions",
    ),
    "checkpointed, reentrant": (
        lambda m, x: checkpoint(lambda y: y + m.a(y), x, use_reentrant=True),
        {"a": _linear}, "identity", "",
    ),
    "checkpointed": (
        lambda m, x: checkpoint(lambda y: y + m.a(y), x, use_reentrant=False),
        {"a": _linear}, "identity", "",
    ),
    "a layer after the addition": (
        lambda m, x: m.b(x + m.a(x)), {"a": _linear, "b": _linear}, "transition", "a layer after",
    ),
    "a layer before the skip": (
        lambda m, x: (lambda h: h + m.a(h))(m.b(x)), {"a": _linear, "b": _linear},
        "transition", "a layer before",
    ),
}  # fmt: skip


class Residual(nn.Module):
    """The input is added to what any module makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(5), _linear(), nn.GELU(), _linear())


def residual_wrappers() -> Made:
    layers = [nn.Sequential(Residual(_mlp()), Residual(_mlp())) for _ in range(2)]
    return nn.Sequential(_linear(), *layers).double(), torch.randn(6, 5).double()


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([_mlp(), _mlp()]) for _ in range(2))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        for mix, feed in self.layers:
            x = mix(x) + x
            x = feed(x) + x
        return self.norm(x)


def loop_over_pairs() -> Made:
    """The additions of all layers are made in one loop, of a module that is not the model."""
    return nn.Sequential(_linear(), _Loop()).double(), torch.randn(6, 5).double()


class _Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Residual(_mlp()), Residual(_mlp()), _linear())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def residual_in_residual() -> Made:
    return nn.Sequential(_linear(), _Group(), _Group()).double(), torch.randn(6, 5).double()


class _Adapted(nn.Module):
    """A layer of two additions, with a small residual module at the end of each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.feed = _linear(), _mlp()
        self.adapter1, self.adapter2 = Residual(_mlp()), Residual(_mlp())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.adapter1(self.mix(x))
        return x + self.adapter2(self.feed(x))


def adapters() -> Made:
    layers = [_Adapted(), _Adapted()]
    return nn.Sequential(_linear(), *layers).double(), torch.randn(6, 5).double()


class _LowRank(nn.Module):
    """A layer and a low-rank change of it: a sum of two branches, but no residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = _linear(), nn.Linear(5, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class _LowRankLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = _LowRank(), _LowRank()
        self.first, self.second = _LowRank(), _LowRank()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(self.query(x)) * self.value(x)
        return x + self.second(torch.relu(self.first(x)))


def low_rank_layers() -> Made:
    layers = [_LowRankLayer(), _LowRankLayer()]
    return nn.Sequential(_linear(), *layers).double(), torch.randn(6, 5).double()


class _Output(nn.Module):
    """Adds the skip, which it gets as its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = _linear(), nn.LayerNorm(5)

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + skip)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output = _linear(), _Output()

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.output(torch.tanh(self.inner(hidden)), hidden),)


class _TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def sum_in_the_head() -> Made:
    layers = [_linear(), Residual(_mlp()), Residual(_mlp()), _linear(), _TwoBranches()]
    return nn.Sequential(*layers).double(), torch.randn(6, 5).double()


class _BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = _Attention(), _linear(), _Output()

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        attended = self.attention(hidden)[0]
        return (self.output(F.gelu(self.intermediate(attended)), attended),)


class _Bert(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.position = _linear()
        self.layer = nn.ModuleList(_BertLayer() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)  # an addition of the encoder's own, before its layers
        for layer in self.layer:
            x = layer(x)[0]
        return x


def additions_in_children(depth: int = 2) -> Made:
    """The encoder makes an addition too, and its input is that of the skip."""
    model = nn.Sequential(_linear(), _Bert(depth), nn.Linear(5, 2))
    return model.double(), torch.randn(6, 5).double()


def one_layer_encoder() -> Made:
    return additions_in_children(depth=1)


class _SecondOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.side, self.inner = _linear(), _mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.side(x), x + self.inner(x)


class _SecondOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_SecondOutput() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        sides = []
        for block in self.blocks:
            side, x = block(x)
            sides.append(side)
        return x, sides


def stream_in_the_second_output() -> Made:
    return _SecondOutputs().double(), torch.randn(6, 5).double()


class _Hourglass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = _conv(4, 4), _conv(4, 4)
        self.down, self.up = _conv(4, 4, 2), nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(self.up(F.relu(self.down(x))) + x)


def additive_unet() -> Made:
    """One addition from end to end of a network does not make a block of it."""
    return nn.Sequential(_conv(3, 4), _Hourglass()).double(), torch.randn(2, 3, 8, 8).double()


class _Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], -1)


def reversible() -> Made:
    return nn.Sequential(*(_Reversible() for _ in range(3))).double(), torch.randn(4, 6).double()


class _PaddedBlock(nn.Module):
    """The shortcut without weights: every second pixel, zeros for the new channels."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(c_in, c_out, stride), _conv(c_out, c_out)
        self.stride, self.new = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new))
        return F.relu(x + out)


def padded_shortcut() -> Made:
    blocks = [_PaddedBlock(4, 4, 1), _PaddedBlock(4, 8, 2), _PaddedBlock(8, 8, 1)]
    return nn.Sequential(_conv(3, 4), *blocks).double(), torch.randn(2, 3, 8, 8).double()


class _Inverted(nn.Module):
    """Has a skip only where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.expand, self.depthwise = _conv(c_in, 2 * c_in), _conv(2 * c_in, 2 * c_in, stride)
        self.reduce = nn.Conv2d(2 * c_in, c_out, 1)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out = self.reduce(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return x + out if self.skip else out


def skip_where_it_fits() -> Made:
    blocks = [_Inverted(4, 6, 1), _Inverted(6, 6, 1), _Inverted(6, 8, 2), _Inverted(8, 8, 1)]
    return nn.Sequential(_conv(3, 4), *blocks).double(), torch.randn(2, 3, 8, 8).double()


class _TimedBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first, self.second = _conv(c_in, c_out), _conv(c_out, c_out)
        self.time = nn.Linear(3, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(F.silu(x))
        hidden = hidden + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.second(F.silu(hidden))


class _Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 3), nn.SiLU(), nn.Linear(3, 3))
        self.stem, self.out = _conv(3, 4), _conv(4, 3)
        self.down1, self.shrink, self.down2 = _TimedBlock(4, 4), _conv(4, 4, 2), _TimedBlock(4, 8)
        self.middle, self.up2 = _TimedBlock(8, 8), _TimedBlock(16, 4)
        self.grow, self.up1 = nn.ConvTranspose2d(4, 4, 2, 2), _TimedBlock(8, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)
        one = self.down1(self.stem(x), time)
        two = self.down2(self.shrink(one), time)
        up = self.up2(torch.cat([self.middle(two, time), two], 1), time)
        return self.out(self.up1(torch.cat([self.grow(up), one], 1), time))


def diffusion_unet() -> Made:
    """An embedding of the time is added within the branches of all blocks."""
    inputs = torch.randn(2, 3, 8, 8).double(), torch.rand(2, 1).double()
    return _Diffusion().double(), inputs


class _Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.onward, self.out = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.conv(x).chunk(2, 1)
        gated = torch.tanh(a) * torch.sigmoid(b)
        return x + self.onward(gated), self.out(gated)


class _WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 2, 1)
        self.blocks = nn.ModuleList(_Wave() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), 0
        for block in self.blocks:
            x, out = block(x)
            total = total + out
        return self.head(F.relu(total))


def summed_outputs() -> Made:
    """The model sums what its blocks put out beside their stream."""
    return _WaveNet().double(), torch.randn(2, 2, 9).double()


class _Dropped(nn.Module):
    def __init__(self, *, dropped: bool) -> None:
        super().__init__()
        self.inner, self.dropped = _linear(), dropped

    def forward(self, x: Tensor) -> Tensor:
        return x if self.dropped else x + self.inner(x)


def skipped_block() -> Made:
    """One block is left out in this pass, as stochastic depth does."""
    blocks = [_Dropped(dropped=i == 1) for i in range(3)]
    return nn.Sequential(_linear(), *blocks).double(), torch.randn(6, 5).double()


class _Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, 6))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(6, 2, 8, batch_first=True) for _ in range(2)
        )

    def forward(self, memory: Tensor) -> Tensor:
        x = self.queries.expand(len(memory), -1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        return x


def learned_queries() -> Made:
    return _Queries().double(), torch.randn(2, 3, 6).double()


def encoder_decoder() -> Made:
    model = nn.Transformer(4, 2, 2, 2, 8, batch_first=True)
    return model.double(), (torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double())


def single_block() -> Made:
    return Residual(_mlp()).double(), torch.randn(6, 5).double()


def traced() -> Made:
    """By torch.fx: the blocks' own modules are gone, their parts and additions remain."""
    model, inputs = chain(lambda m, x: x + m.a(x), a=_linear)
    return torch.fx.symbolic_trace(copy.deepcopy(model)), inputs


_IDENTITY, _TRANSITION, _PLAIN = "identity", "transition", "plain"

#: By name: how to make it, and the kinds of its blocks by name, in order.
UNUSUAL: dict[str, tuple[Callable[[], Made], dict[str, str]]] = {
    "residual_wrappers": (
        residual_wrappers, dict.fromkeys(["1.0", "1.1", "2.0", "2.1"], _IDENTITY),
    ),
    "loop_over_pairs": (
        loop_over_pairs,
        dict.fromkeys([f"1.layers.{i}.{j}" for i in (0, 1) for j in (0, 1)], _PLAIN),
    ),
    "residual_in_residual": (
        residual_in_residual,
        {
            "1.body.0": _IDENTITY, "1.body.1": _IDENTITY, "1.body.2": _PLAIN,
            "2.body.0": _IDENTITY, "2.body.1": _IDENTITY,
        },
    ),
    "adapters": (adapters, dict.fromkeys(["1", "2"], _IDENTITY)),
    "low_rank_layers": (low_rank_layers, dict.fromkeys(["1", "2"], _IDENTITY)),
    "sum_in_the_head": (sum_in_the_head, dict.fromkeys("12", _IDENTITY)),
    "additions_in_children": (
        additions_in_children, dict.fromkeys(["1.layer.0", "1.layer.1"], _IDENTITY),
    ),
    "one_layer_encoder": (one_layer_encoder, {"1.layer.0": _IDENTITY}),
    "stream_in_the_second_output": (
        stream_in_the_second_output, dict.fromkeys(["blocks.0", "blocks.1"], _IDENTITY),
    ),
    "additive_unet": (additive_unet, dict.fromkeys("01", _PLAIN)),
    "reversible": (reversible, dict.fromkeys("012", _IDENTITY)),
    "padded_shortcut": (
        padded_shortcut, {"1": _IDENTITY, "2": _TRANSITION, "3": _IDENTITY},
    ),
    "skip_where_it_fits": (
        skip_where_it_fits,
        {"1": _TRANSITION, "2": _IDENTITY, "3": _TRANSITION, "4": _IDENTITY},
    ),
    "diffusion_unet": (
        diffusion_unet,
        {
            "down1": _IDENTITY, "shrink": _TRANSITION, "down2": _TRANSITION, "middle": _IDENTITY,
            "up2": _TRANSITION, "grow": _TRANSITION, "up1": _TRANSITION,
        },
    ),
    "summed_outputs": (summed_outputs, dict.fromkeys([f"blocks.{i}" for i in range(3)], _IDENTITY)),
    "skipped_block": (skipped_block, dict.fromkeys("123", _IDENTITY)),
    "learned_queries": (learned_queries, dict.fromkeys(["layers.0", "layers.1"], _IDENTITY)),
    "encoder_decoder": (
        encoder_decoder,
        dict.fromkeys(
            ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"],
            _IDENTITY,
        ),
    ),
    "single_block": (single_block, {"": _IDENTITY}),
    "traced": (traced, dict.fromkeys(["1.a", "2.a", "3.a"], _PLAIN)),
}  # fmt: skip
