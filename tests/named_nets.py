"""Networks, data and losses in a module of their own, for the command line to find by name."""

from __future__ import annotations

import sys

from checkups import checkup

from conditioning.__main__ import main

RANDOM = ("--input-shape", "3", "--classes", "2")

NETS = '''
"""Networks to examine."""

import time

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(7, 4), Block(), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens)))


class Slow(Net):
    """Takes its time in each backward pass, and leaves a byte behind."""

    def forward(self, x):
        outputs = super().forward(x)
        if outputs.requires_grad:
            outputs.register_hook(self.slow)
        return outputs

    def slow(self, _):
        time.sleep(0.1)
        with open("running", "a") as file:
            file.write(".")


def batch():
    return torch.randn(10, 3), torch.randint(2, (10,))


def loader():
    data = torch.utils.data.TensorDataset(*batch())
    return torch.utils.data.DataLoader(data, batch_size=5)


def data_set():
    return torch.utils.data.TensorDataset(*batch())


def everything():
    print("built")
    return Net(), nn.MSELoss(), (torch.randn(10, 3), torch.randn(10, 2))


def with_width(width):
    return nn.Linear(width, width)


def broken():
    raise ValueError("no weights here")


def pair():
    return Net(), nn.MSELoss()


def huber(outputs, targets):
    return nn.functional.huber_loss(outputs, nn.functional.one_hot(targets, 2).float())


class Holder:
    net = Net()


def empty():
    return []


net = Net()
number = 3
'''


def named_nets(tmp_path, monkeypatch):
    """Enter an empty folder with the module ``nets``; forget it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(NETS)
    yield tmp_path
    for name in ("nets", "failing", "wanting"):
        sys.modules.pop(name, None)


def record_calls(monkeypatch):
    """Put something in the place of the checkup that notes what it is called with."""
    calls = []

    def fake(model, loss_fn, data, **options):
        calls.append({"model": model, "loss_fn": loss_fn, "data": data, **options})
        return checkup(findings=False)

    monkeypatch.setattr("conditioning.cli.commands.checkup", fake)
    return calls


def fails(capsys, *arguments):
    """The one line that a command with bad input prints."""
    assert main(list(map(str, arguments))) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    return shown.err.removeprefix("error: ").strip()


class Trap:
    """Unpickling this leaves a file behind."""

    def __reduce__(self):
        return open, ("trapped", "w")
