"""The checkup against dense truth and autograd, on many networks, in a budget, interrupted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import ZOO
from architectures_unusual import UNUSUAL
from conftest import PROBLEMS, Snapshot, dense_gauss_newton, dense_hessian
from torch import Tensor, nn

from conditioning.checkup import Checkup, checkup
from conditioning.checkup.jacobians import spread
from conditioning.checkup.passes import recurrent_norm
from conditioning.checkup.steady import steady
from conditioning.errors import (
    BatchFormatError,
    BlockSelectionError,
    EmptyDataError,
    InvalidArgumentError,
    LossWithoutGraphError,
    NonScalarLossError,
    NoTrainableParametersError,
    OneShotDataError,
    ParameterSelectionError,
)
from conditioning.operators.batches import tensors_in

QUICK = {"seconds": None, "num_matvecs": 120}
LONG = {"seconds": None, "num_matvecs": 1000}
NETS = (
    "preact_resnet", "inplace_relu_first", "torchvision_layout", "shared_block", "unet",
    "autoencoder", "lstm", "encoder_prenorm", "encoder_postnorm", "gpt_dicts", "single_block",
    "skipped_block", "traced", "padded_shortcut",
)  # fmt: skip


def total(outputs, _):
    """A smooth loss of whatever a network returns."""
    found = [t for t in tensors_in(outputs) if t.dtype.is_floating_point]
    return sum((t.tanh() ** 2).mean() for t in found)


def mlp(depth=3, width=6, classes=3):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, classes)).double()


def batch(samples=12, width=6, classes=3):
    return torch.randn(samples, width).double(), torch.randint(classes, (samples,))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# -- against the truth ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "lstm", "transformer", "frozen", "subset"])
def test_spectra_are_those_of_the_dense_matrices(name):
    problem = PROBLEMS[name]()
    report = checkup(
        problem.model, problem.loss_fn, problem.batch, params=problem.params, seconds=None,
        num_matvecs=3000,
    )  # fmt: skip
    assert report.status == "complete"
    for reading, dense in (
        (report.hessian, dense_hessian(problem)), (report.gauss_newton, dense_gauss_newton(problem))
    ):  # fmt: skip
        values = torch.linalg.eigvalsh((dense + dense.T) / 2).numpy()
        assert values[-1] in wide(reading.largest)
        assert values[0] in wide(reading.smallest)
        assert values.sum() == pytest.approx(reading.trace.value, rel=1e-9, abs=1e-9)
        threshold = reading.condition.zero_threshold
        assert np.mean(values < -threshold) == pytest.approx(reading.index.value, abs=1e-12)
        assert sum(reading.density.weights) == pytest.approx(1)
    if problem.params is None:
        stable = report.step_size.largest_stable.value
        assert stable == pytest.approx(2 / report.hessian.largest.value)
    else:  # the curvature of a part says nothing of a step of all
        assert report.step_size is None
        assert any("largest stable step" in missing.what for missing in report.missing)


def wide(estimate, slack=1e-9):
    from conditioning import Estimate

    return Estimate(estimate.value, estimate.low - slack, estimate.high + slack)


def test_norms_are_those_of_autograd():
    model, (x, y) = mlp(), batch()
    report = checkup(model, nn.CrossEntropyLoss(), (x, y), blocks=["0", "2", "4"], **LONG)
    streams = [x.clone().requires_grad_()]
    for layer in model:
        streams.append(layer(streams[-1]))
    loss = nn.functional.cross_entropy(streams[-1], y)
    gradients = torch.autograd.grad(loss, streams)
    assert report.loss.value == pytest.approx(float(loss.detach()))
    own = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.parameters())
    assert report.gradient_norm.value == pytest.approx(
        float(torch.cat([g.flatten() for g in own]).norm())
    )
    for place, reading in zip((0, 2, 4), report.blocks, strict=True):
        expected = {
            "act_in": streams[place], "act_out": streams[place + 1], "grad_in": gradients[place],
            "grad_out": gradients[place + 1],
        }  # fmt: skip
        for quantity, tensor in expected.items():
            assert getattr(reading, quantity).value == pytest.approx(float(tensor.detach().norm()))
        assert reading.ratio.value == pytest.approx(
            float(gradients[place].norm() / gradients[place + 1].norm())
        )
        jacobian = model[place].weight.detach()
        largest = float(torch.linalg.matrix_norm(jacobian, 2))
        assert reading.jacobian.largest.low <= largest <= reading.jacobian.largest.high * 1.0001
    assert report.product.value == pytest.approx(float(gradients[0].norm() / gradients[5].norm()))
    assert report.mean_deviation.value == pytest.approx(
        np.mean([abs(1 - reading.ratio.value) for reading in report.blocks])
    )


def test_several_batches_give_the_mean_and_the_range():
    model = mlp()
    batches = [batch(), batch(), batch(7)]
    report = checkup(model, nn.CrossEntropyLoss(), batches, **QUICK)
    losses = [float(nn.functional.cross_entropy(model(x), y).detach()) for x, y in batches]
    assert report.setting.num_batches == 3
    assert report.setting.num_samples == 31
    assert (report.loss.low, report.loss.high) == pytest.approx((min(losses), max(losses)))
    assert report.loss.value == pytest.approx(np.mean(losses))
    assert report.blocks[0].ratio.low < report.blocks[0].ratio.high


def test_shuffled_data_are_the_same_in_every_pass():
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(*batch(24)), batch_size=8, shuffle=True)
    model = mlp()
    before = Snapshot(model)
    report = checkup(model, nn.CrossEntropyLoss(), loader, **QUICK)
    before.assert_unchanged()
    assert report.setting.num_batches == 3
    again = checkup(model, nn.CrossEntropyLoss(), loader, **QUICK)
    assert report.blocks == again.blocks
    assert report.hessian.condition == again.hessian.condition


def test_activations_are_counted():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias[1] = -1e3  # one unit of four is dead
        model[2].weight[0].mul_(1e4)  # one of three is saturated
    x, y = torch.randn(50, 5), torch.randint(2, (50,))
    report = checkup(model, nn.CrossEntropyLoss(), [(x[:30], y[:30]), (x[30:], y[30:])], **QUICK)
    relu, tanh = report.activations
    assert (relu.name, relu.function, relu.num_units, relu.dead_share) == ("1", "relu", 4, 0.25)
    inner = model[0](x).detach()
    assert relu.flat_share == pytest.approx(float((inner <= 0).double().mean()))
    assert relu.rms_in == pytest.approx(float(inner.square().mean().sqrt()), rel=1e-5)
    into = model[2](torch.relu(inner)).detach()
    assert tanh.function == "tanh"
    assert tanh.flat_share == pytest.approx(
        float((1 - torch.tanh(into) ** 2 <= 0.01).double().mean()), abs=0.02
    )


def test_units_are_channels_of_convolutions_and_features_of_the_rest():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.flat, self.mix = nn.Conv1d(2, 6, 3), nn.Linear(5, 7), nn.Linear(42, 2)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.mix(torch.relu(self.flat(x)).flatten(1))

    data = torch.randn(4, 2, 7), torch.randint(2, (4,))
    report = checkup(Net(), nn.CrossEntropyLoss(), data, **QUICK)
    assert [(use.name, use.num_units) for use in report.activations] == [
        ("(model)", 6), ("(model)#2", 7)
    ]  # fmt: skip
    assert [(layer.name, layer.followed_by) for layer in report.layers] == [
        ("conv", "relu"), ("flat", "relu"), ("mix", "")
    ]  # fmt: skip


def test_layers_have_their_gain_role_and_singular_values():
    torch.manual_seed(1)
    model, inputs = ZOO["torchvision_layout"]()
    report = checkup(model, total, (inputs, None), **QUICK)
    by_role = {}
    for layer in report.layers:
        by_role.setdefault(layer.role, []).append(layer)
    assert len(by_role["stem"]) == 1
    assert len(by_role["head"]) == 1
    for layer in by_role["transition"]:
        weight = model.get_submodule(layer.name).weight.detach()
        assert layer.largest.value > 0
        assert layer.target == pytest.approx(math.sqrt(weight.shape[0] / min(weight.shape[:2])))
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        assert layer.fan_in == weight[0].numel()
        gain = float(weight.square().mean().sqrt()) * math.sqrt(weight[0].numel())
        assert layer.weight_gain == pytest.approx(gain)
    convolutions = [layer for layer in report.layers if layer.classes == "Conv2d"]
    assert convolutions
    assert all(layer.normalised for layer in convolutions)


@pytest.mark.parametrize(
    ("activation", "name", "flat"),
    [
        (nn.ReLU6(), "relu6", lambda x: (x <= 0) | (x >= 6)),
        (nn.Hardtanh(-10, 10), "hardtanh", lambda x: x.abs() >= 10),
        (nn.Hardtanh(), "hardtanh", lambda x: x.abs() >= 1),
        (nn.Softplus(beta=4), "softplus", lambda x: torch.sigmoid(4 * x) <= 0.01),
        (nn.PReLU(), "leaky_relu", lambda x: torch.zeros_like(x) > 1),
        (nn.Mish(), "mish", None),
        (nn.Hardswish(), "hardswish", None),
        (nn.CELU(), "celu", lambda x: torch.exp(x.clamp(max=0)) <= 0.01),
    ],
    ids=lambda value: type(value).__name__,
)
def test_activations_have_their_own_bounds(activation, name, flat):
    model = nn.Sequential(nn.Linear(5, 40), activation, nn.Linear(40, 2)).double()
    x, y = 8 * torch.randn(30, 5).double(), torch.randint(2, (30,))
    report = checkup(model, nn.CrossEntropyLoss(), (x, y), **QUICK)
    (use,) = report.activations
    inner = model[0](x).detach()
    if flat is None:  # by automatic differentiation
        leaf = inner.clone().requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf).sum(), leaf)
        expected = slope <= 0.01
    else:
        expected = flat(inner)
    assert (use.function, use.num_units) == (name, 40)
    assert use.flat_share == pytest.approx(float(expected.double().mean()))


def test_a_clamp_at_zero_is_a_relu_and_another_is_none():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(torch.clamp(self.one(x), min=0).clamp(-1e3, 1e3))

    report = checkup(Net().double(), nn.CrossEntropyLoss(), batch(), **QUICK)
    assert [use.function for use in report.activations] == ["relu"]
    assert report.layers[0].followed_by == "relu"


def test_small_and_large_numbers_keep_their_precision():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = batch()
    for scale in (1e-60, 1e25):
        report = checkup(model, nn.CrossEntropyLoss(), (scale * x, y), **QUICK)
        (use,) = report.activations
        assert 0.2 < use.flat_share < 0.8
        assert use.rms_in == pytest.approx(
            scale * float(model[0](x).detach().square().mean().sqrt())
        )


def test_units_are_on_the_axis_of_the_last_layer():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 11), nn.Linear(11, 2)

        def forward(self, x):
            x = torch.relu(self.conv(x)).permute(0, 2, 3, 1)
            return self.head(torch.relu(self.mix(x)).mean((1, 2)))

    data = torch.randn(4, 3, 8, 8), torch.randint(2, (4,))
    report = checkup(Last(), nn.CrossEntropyLoss(), data, **QUICK)
    assert [use.num_units for use in report.activations] == [6, 11]


def test_the_last_state_of_an_lstm_is_enough():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.lstm = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            _, (state, _) = self.lstm(self.mix(x))
            return self.head(state[-1])

    data = torch.randn(4, 12, 3).double(), torch.randint(2, (4,))
    report = checkup(Net().double(), nn.CrossEntropyLoss(), data, **QUICK)
    assert report.recurrent[0].num_steps == 12
    assert report.recurrent[0].growth_per_step.value > 0


def test_what_says_nothing_of_time_is_not_called_growth():
    class Net(nn.Module):
        def __init__(self, *, both):
            super().__init__()
            self.rnn = nn.RNN(3, 5, batch_first=True, bidirectional=both)
            self.head = nn.Linear(10 if both else 5, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, 0])

    data = torch.randn(4, 12, 3).double(), torch.randint(2, (4,))
    report = checkup(Net(both=False).double(), nn.CrossEntropyLoss(), data, **QUICK)
    assert math.isnan(report.recurrent[0].growth_per_step.value)
    assert not report.problems
    report = checkup(Net(both=True).double(), nn.CrossEntropyLoss(), data, **QUICK)
    assert report.recurrent == ()
    assert any("both directions" in missing.reason for missing in report.missing)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_along_time_are_those_of_autograd(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(3, 5, batch_first=batch_first), nn.Linear(5, 2)

        def forward(self, x):
            out = self.rnn(x)[0]
            return self.head(out[:, -1] if batch_first else out[-1])

    model = Net().double()
    shape = (4, 12, 3) if batch_first else (12, 4, 3)
    x, y = torch.randn(shape).double(), torch.randint(2, (4,))
    report = checkup(model, nn.CrossEntropyLoss(), (x, y), **QUICK)
    (reading,) = report.recurrent
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
    norms = gradient.norm(dim=(0, 2) if batch_first else (1, 2))
    assert reading.num_steps == 12
    assert reading.gradient_first.value == pytest.approx(float(norms[0]))
    assert reading.gradient_last.value == pytest.approx(float(norms[-1]))
    slope = np.polyfit(np.arange(12), np.log(norms.numpy()), 1)[0]
    assert reading.growth_per_step.value == pytest.approx(math.exp(-slope))
    largest = float(torch.linalg.matrix_norm(model.rnn.weight_hh_l0.detach(), 2))
    assert reading.recurrent_norm == pytest.approx(largest)


def test_a_loop_over_a_cell_is_followed_by_its_state():
    class Net(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.cell, self.head = nn.RNNCell(3, 5), nn.Linear(5, 2)
            with torch.no_grad():
                self.cell.weight_hh.copy_(scale * torch.eye(5))
                self.cell.weight_ih.mul_(1e-3)
                self.cell.bias_ih.zero_()
                self.cell.bias_hh.zero_()

        def forward(self, x):
            state = x.new_zeros(x.shape[0], 5)
            for step in range(x.shape[1]):
                state = self.cell(x[:, step], state)
            return self.head(state)

    data = torch.randn(4, 15, 3).double(), torch.randint(2, (4,))
    report = checkup(Net(0.8).double(), nn.CrossEntropyLoss(), data, **QUICK)
    (reading,) = report.recurrent
    # The state stays so small that tanh is the identity: every step multiplies by the weight.
    assert reading.growth_per_step.value == pytest.approx(0.8, rel=1e-4)
    assert reading.recurrent_norm == pytest.approx(0.8)


def test_the_norm_of_gates_is_taken_gate_by_gate():
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    expected = max(
        float(torch.linalg.matrix_norm(part.detach().double(), 2))
        for name, weight in lstm.named_parameters()
        if name.startswith("weight_hh")
        for part in weight.split(4)
    )
    assert recurrent_norm(lstm) == pytest.approx(expected)


# -- every kind of network --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::conditioning.errors.ConditioningWarning")
@pytest.mark.parametrize("name", NETS)
def test_networks_of_every_kind_are_left_as_they_were(name):
    make = ZOO[name] if name in ZOO else UNUSUAL[name][0]
    model, inputs = make()
    before = Snapshot(model)
    report = checkup(model, total, (inputs, None), **QUICK)
    before.assert_unchanged()
    assert report.status in ("complete", "out of budget")
    assert math.isfinite(report.loss.value)
    assert len(report.blocks)
    assert all(reading.ratio.value > 0 for reading in report.blocks)
    assert report.hessian is not None
    assert Checkup.from_json(report.to_json()).to_json() == report.to_json()


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "plain"])
@pytest.mark.parametrize("depth", [20, 56, 110])
def test_cifar_resnets(depth, norm):
    from experiments.models.cifar_resnet import CifarResNet

    generator = torch.Generator().manual_seed(0)
    model = CifarResNet((depth - 2) // 9, bn=norm, widths=(4, 8, 16), generator=generator)
    data = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    report = checkup(model, nn.CrossEntropyLoss(), data, seconds=None, num_matvecs=50)
    assert len(report.blocks) == (depth - 2) // 3
    ratios = [b.ratio.value for b in report.blocks if b.kind == "identity"][: depth // 9 - 1]
    assert all(ratio > 1 for ratio in ratios)
    if norm and depth > 20:
        # The stream of a normalised net grows, and the branches do not.
        assert ratios[-1] < ratios[0]
    assert report.hessian.largest.low > 0


class Bottleneck(nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + skip)


class ResNet50(nn.Module):
    """In the layout of torchvision: the names, the order, 25.6 million parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside = 64
        for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            blocks = []
            for place in range(count):
                blocks.append(Bottleneck(inside, width, 2 if place == 0 and stage > 1 else 1))
                inside = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


@pytest.mark.slow
def test_a_resnet_50_in_the_layout_of_torchvision():
    data = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))
    model = ResNet50().eval()
    report = checkup(
        model, nn.CrossEntropyLoss(), data, params="fc.*", seconds=None, num_matvecs=50
    )
    assert report.setting.num_parameters == 25_557_032
    assert [b.name for b in report.blocks if b.kind == "transition"] == [
        f"layer{stage}.0" for stage in (1, 2, 3, 4)
    ]
    assert len(report.blocks) == 16
    transitions = [layer.name for layer in report.layers if layer.role == "transition"]
    assert transitions == [f"layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4)]
    assert report.hessian.size == 2048 * 1000 + 1000
    assert report.hessian.smallest.high > -1e-3  # that of a linear layer under cross entropy


def test_models_of_other_libraries():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=5)
    data = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    report = checkup(model, nn.CrossEntropyLoss(), data, params="fc.*", **QUICK)
    assert len(report.blocks) == 8


def test_a_hugging_face_model_that_returns_its_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(30, (3, 10))
    report = checkup(
        model, lambda outputs, _: outputs.loss, ({"input_ids": tokens, "labels": tokens}, None),
        **QUICK,
    )  # fmt: skip
    assert len(report.blocks) == 2
    assert any("Dropout" in note for note in report.setting.notes)


def test_an_autoencoder_with_a_reconstruction_loss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU()
            )
            self.up = nn.Sequential(
                nn.ConvTranspose2d(4, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2)
            )

        def forward(self, x):
            return self.up(self.down(x))

    images = torch.randn(6, 3, 8, 8)
    report = checkup(Net(), nn.MSELoss(), (images, images), **QUICK)
    # At every position of the output one tap of a kernel of its stride meets four channels.
    gains = {layer.name: (layer.fan_in, layer.followed_by) for layer in report.layers}
    assert gains["up.0"] == (4, "relu")
    assert gains["down.0"] == (27, "relu")
    assert len(report.activations) == 3
    assert report.gauss_newton.smallest.high > -1e-5  # no direction curves downwards


def test_attention_is_switched_to_its_math_path_and_back():
    model, inputs = ZOO["encoder_prenorm"]()
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    report = checkup(model, total, (inputs, None), **QUICK)
    assert any("math path" in note for note in report.setting.notes)
    assert flags == (
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    )  # fmt: skip
    assert report.hessian is not None


def test_a_model_that_returns_its_loss():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, both):
            return nn.functional.cross_entropy(self.net(both[0]), both[1])

    report = checkup(WithLoss(), None, batch(), **QUICK)
    assert report.hessian is not None
    assert report.gauss_newton is None
    assert any("loss_fn" in missing.reason for missing in report.missing)


# -- modes ------------------------------------------------------------------------------------


def test_training_mode_is_kept_but_for_chance():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)
    ).double()
    x, y = batch()
    model[1].running_mean.fill_(3.0)
    before = Snapshot(model)
    report = checkup(model, nn.CrossEntropyLoss(), (x, y), **QUICK)
    before.assert_unchanged()
    hidden = nn.functional.batch_norm(
        model[0](x), None, None, model[1].weight, model[1].bias, training=True
    )
    expected = nn.functional.cross_entropy(model[4](torch.relu(hidden)), y)
    assert report.loss.value == pytest.approx(float(expected.detach()))
    assert any("2 (Dropout)" in note for note in report.setting.notes)
    model.eval()
    report = checkup(model, nn.CrossEntropyLoss(), (x, y), **QUICK)
    assert report.loss.value == pytest.approx(
        float(nn.functional.cross_entropy(model(x), y).detach())
    )
    assert report.setting.mode == "evaluation"


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()

    def inside():
        with steady(model):
            assert model[0].training
            assert not model[0].track_running_stats
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert model.training
    assert model[0].training
    assert model[0].track_running_stats
    assert not model[1].training


def test_a_model_that_returns_something_else_in_evaluation_runs_in_training():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.drop = mlp(), nn.Dropout(0.5)

        def forward(self, x):
            out = self.net(self.drop(x))
            return {"logits": out} if self.training else out.argmax(-1)

    model, data = Net(), batch()
    before = Snapshot(model)
    report = checkup(
        model, lambda out, y: nn.functional.cross_entropy(out["logits"], y), data, **QUICK
    )
    before.assert_unchanged()
    assert report.hessian is not None
    assert any("drop (Dropout)" in note for note in report.setting.notes)


def test_the_data_are_left_alone_by_models_that_work_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), *mlp())
    x, y = batch()
    before = x.clone()
    report = checkup(model, nn.CrossEntropyLoss(), (x, y), **QUICK)
    assert torch.equal(x, before)
    assert report.hessian is not None


def test_a_loader_without_a_length():
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for label in range(6):
                yield torch.randn(6, generator=generator).double(), label % 3

    loader = DataLoader(Stream(), batch_size=3)
    report = checkup(mlp(), nn.CrossEntropyLoss(), loader, **QUICK)
    assert report.setting.num_batches == 2
    assert report.hessian is not None


def test_compiled_models_are_measured_as_written():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    report = checkup(compiled, nn.CrossEntropyLoss(), batch(), **QUICK)
    assert report.setting.model == "Sequential"
    assert any("OptimizedModule" in note for note in report.setting.notes)


# -- learning rates, predictions --------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_diverges_beyond_the_largest_stable_step(momentum):
    model = nn.Linear(4, 1, bias=False).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()

    def loss(factor):
        report = checkup(model, nn.MSELoss(), (x, y), learning_rate=0.1, momentum=momentum, **QUICK)
        assert report.step_size.quotient.value == pytest.approx(
            0.1 / report.step_size.largest_stable.value
        )
        copy = nn.Linear(4, 1, bias=False).double()
        copy.load_state_dict(model.state_dict())
        rate = factor * report.step_size.largest_stable.value
        optimizer = torch.optim.SGD(copy.parameters(), rate, momentum=momentum)
        for _ in range(2000):
            optimizer.zero_grad()
            value = nn.functional.mse_loss(copy(x), y)
            value.backward()
            optimizer.step()
        return float(value.detach())

    assert loss(0.98) < 10
    assert not loss(1.02) < 1e6


class Residual(nn.Module):
    def __init__(self, width, scale):
        super().__init__()
        self.inner, self.scale = nn.Linear(width, width, bias=False), scale
        self.outer = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.inner.weight, std=math.sqrt(2 / width))
        nn.init.normal_(self.outer.weight, std=math.sqrt(1 / width))

    def forward(self, x):
        return x + self.scale * self.outer(torch.relu(self.inner(x)))


@pytest.mark.parametrize(("exponent", "agrees"), [(0.5, "inside"), (0.0, "outside")])
def test_growth_is_compared_with_that_of_tau(exponent, agrees):
    depth = 24
    model = nn.Sequential(*(Residual(32, depth**-exponent) for _ in range(depth)), nn.Linear(32, 3))
    data = torch.randn(16, 32), torch.randint(3, (16,))
    report = checkup(model, nn.CrossEntropyLoss(), data, **QUICK)
    (growth,) = [p for p in report.predictions if p.name.startswith("growth")]
    assert growth.agrees == agrees


def test_ratios_lie_in_the_bands_of_their_jacobians():
    model = nn.Sequential(*(Residual(6, 0.3) for _ in range(4)), nn.Linear(6, 3)).double()
    data = batch(2)
    report = checkup(model, nn.CrossEntropyLoss(), data, **LONG)
    one, product = [p for p in report.predictions if "growth" not in p.name]
    branches = []
    x = data[0]
    for block in model[:4]:
        jacobian = torch.func.vmap(torch.func.jacrev(block))(x)
        norms = torch.linalg.matrix_norm(jacobian.detach() - torch.eye(6), 2)
        branches.append(float(norms.max()))
        x = block(x).detach()
    assert (one.agrees, product.agrees) == ("inside", "inside")
    assert one.high == pytest.approx(1 + max(branches), rel=1e-6)
    assert product.high == pytest.approx(np.prod([1 + b for b in branches]), rel=1e-6)
    # On other samples than those of the Jacobians nothing is refuted.
    several = checkup(model, nn.CrossEntropyLoss(), [data, batch(2)], **LONG)
    assert "outside" not in [p.agrees for p in several.predictions if "growth" not in p.name]


# -- the end of it ----------------------------------------------------------------------------


def test_a_small_budget_ends_it_and_says_what_is_missing():
    report = checkup(mlp(6, 40), nn.CrossEntropyLoss(), batch(width=40), seconds=1e-3)
    assert report.status == "out of budget"
    assert report.blocks
    assert {"spectrum of the Hessian matrix", "spectrum of the Gauss-Newton matrix"} <= {
        missing.what for missing in report.missing
    }
    assert all(missing.reason for missing in report.missing)


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_products_are_limited(seconds):
    report = checkup(
        mlp(6, 40), nn.CrossEntropyLoss(), batch(width=40), seconds=seconds, num_matvecs=100
    )
    # The smallest survey of the last matrix may go some products beyond it.
    assert report.num_matvecs <= 115
    assert report.status == "out of budget"
    left = [missing for missing in report.missing if "Jacobians" in missing.what]
    assert "num_matvecs" in left[0].reason
    assert report.hessian.condition.status == "lower bound only"
    assert any("condition number of the Hessian" in missing.what for missing in report.missing)


def test_it_is_the_same_twice():
    torch.manual_seed(3)
    model, data = mlp(), batch()
    one, two = (checkup(model, nn.CrossEntropyLoss(), data, **QUICK) for _ in range(2))
    assert one.blocks == two.blocks
    assert one.hessian.density == two.hessian.density
    assert one.hessian.condition == two.hessian.condition


def test_jacobians_stop_with_the_seconds(monkeypatch):
    import time

    from conditioning.checkup import jacobians

    slow = jacobians.block_jacobians

    def waiting(*arguments, max_matvecs, **options):
        time.sleep(0.004 * max_matvecs)
        return slow(*arguments, max_matvecs=max_matvecs, **options)

    monkeypatch.setattr(jacobians, "block_jacobians", waiting)
    begin = time.monotonic()
    report = checkup(mlp(20), nn.CrossEntropyLoss(), batch(), seconds=2.0)
    known = [reading for reading in report.blocks if reading.jacobian is not None]
    assert 0 < len(known) < len(report.blocks)
    assert any("more seconds" in m.reason for m in report.missing if "Jacobians" in m.what)
    assert time.monotonic() - begin < 20  # all of them with 200 products would take 17 and more


def test_one_stage_that_fails_costs_its_own_numbers_only(monkeypatch):
    from conditioning.checkup import run

    def fail(*_, **__):
        msg = "no such thing"
        raise RuntimeError(msg)

    monkeypatch.setattr(run, "read_layers", fail)
    report = checkup(mlp(), nn.CrossEntropyLoss(), batch(), **LONG)
    assert report.hessian is not None
    assert report.blocks[0].jacobian is not None
    assert any("no such thing" in missing.reason for missing in report.missing)


def test_a_model_of_one_batch_size_is_measured_on_all_samples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1)
            self.head = nn.Linear(64, 2)

        def forward(self, x):
            x = torch.tanh(self.two(torch.tanh(self.one(x).view(8, 64, 10, 10))))
            return self.head(x.mean((2, 3)))

    data = torch.randn(8, 3, 10, 10), torch.randint(2, (8,))
    report = checkup(Net(), nn.CrossEntropyLoss(), data, seconds=None, num_matvecs=240)
    assert all(reading.jacobian is not None for reading in report.blocks)


@pytest.mark.parametrize("stage", ["survey", "block_jacobians", "read_layers"])
def test_ctrl_c_ends_it_with_what_is_known(monkeypatch, stage):
    from conditioning.checkup import jacobians, run, spectra

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    owner = {"survey": spectra, "block_jacobians": jacobians, "read_layers": run}[stage]
    monkeypatch.setattr(owner, stage, interrupt)
    report = checkup(mlp(), nn.CrossEntropyLoss(), batch(), **QUICK)
    assert report.status == "interrupted"
    assert report.blocks
    assert (report.hessian is None) == (stage == "survey")
    assert report.gauss_newton is None
    assert any("interrupted" in missing.reason for missing in report.missing)


def test_ctrl_c_within_a_run_keeps_its_products(monkeypatch):
    from conditioning import HessianOperator

    products = HessianOperator._matmat
    count = 0

    def counting(self, vectors):
        nonlocal count
        count += 1
        if count == 30:
            raise KeyboardInterrupt
        return products(self, vectors)

    monkeypatch.setattr(HessianOperator, "_matmat", counting)
    report = checkup(
        mlp(6, 40), nn.CrossEntropyLoss(), batch(width=40), seconds=None, num_matvecs=400
    )
    assert report.status == "interrupted"
    assert report.hessian.largest.low > 0
    assert "ended early" in report.hessian.message


def test_ctrl_c_between_batches():
    class Data(list):
        def __iter__(self):
            yield self[0]
            raise KeyboardInterrupt

    report = checkup(mlp(), nn.CrossEntropyLoss(), Data([batch(), batch()]), **QUICK)
    assert report.status == "interrupted"
    assert report.setting.num_batches == 1


# -- what is wrong with a network -------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_traced_to_its_block():
    model = mlp(4)
    with torch.no_grad():
        model[4].weight.fill_(math.nan)
    report = checkup(model, nn.CrossEntropyLoss(), batch(), **QUICK)
    assert math.isnan(report.loss.value)
    assert "'4'" in report.nonfinite or "4" in report.nonfinite
    assert report.hessian is None
    assert any("not finite" in missing.reason for missing in report.missing)


def test_an_operation_without_second_derivative_costs_the_spectra_only():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient * (1 - x.tanh() ** 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(Once.apply(self.one(x)))

    report = checkup(Net().double(), nn.CrossEntropyLoss(), batch(), **QUICK)
    assert report.hessian is None
    assert len(report.blocks) == 2
    assert any("Hessian" in missing.what for missing in report.missing)


def bad_batches():
    x, y = batch()
    return [
        ({"model": lambda x: x}, InvalidArgumentError, "nn.Module"),
        ({"data": x}, BatchFormatError, "expected one batch"),
        ({"data": []}, EmptyDataError, "no batch"),
        ({"data": iter([(x, y)])}, OneShotDataError, "one-shot"),
        ({"data": (x[:0], y[:0])}, EmptyDataError, "no sample"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, NonScalarLossError, "one number"),
        ({"loss_fn": lambda o, t: o.detach().sum()}, LossWithoutGraphError, "no autograd graph"),
        ({"blocks": "nothing.*"}, BlockSelectionError, "nothing"),
        ({"params": "nothing.*"}, ParameterSelectionError, "nothing"),
        ({"seconds": -1}, InvalidArgumentError, "seconds"),
        ({"seconds": True}, InvalidArgumentError, "seconds"),
        ({"num_matvecs": 3}, InvalidArgumentError, "num_matvecs"),
        ({"learning_rate": 0.0}, InvalidArgumentError, "learning_rate"),
        ({"learning_rate": math.nan}, InvalidArgumentError, "learning_rate"),
        ({"momentum": 1.0}, InvalidArgumentError, "momentum"),
        ({"seed": 0.5}, InvalidArgumentError, "seed"),
    ]


@pytest.mark.parametrize("place", range(16))
def test_bad_input_is_refused_with_what_to_do(place):
    change, error, match = bad_batches()[place]
    arguments = {"model": mlp(), "loss_fn": nn.CrossEntropyLoss(), "data": batch(), **QUICK}
    with pytest.raises(error, match=match):
        checkup(**(arguments | change))


def test_nothing_to_train():
    model = mlp().requires_grad_(requires_grad=False)
    with pytest.raises(NoTrainableParametersError, match="requires_grad"):
        checkup(model, nn.CrossEntropyLoss(), batch(), **QUICK)


def test_lazy_models_have_to_run_once():
    with pytest.raises(BlockSelectionError, match="Run the model once"):
        checkup(nn.Sequential(nn.LazyLinear(3)), nn.CrossEntropyLoss(), batch(), **QUICK)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 54])
def test_every_beginning_of_the_order_covers_the_depth(count):
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    if count > 7:
        gaps = np.diff(sorted(order[:8]))
        assert gaps.max() <= count // 3


def test_what_is_measured_does_not_depend_on_where_a_tensor_is_kept():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, *, x: Tensor) -> Tensor:
            return self.net(x)

    x, y = batch()
    model = Keyword()
    report = checkup(model, nn.CrossEntropyLoss(), ({"x": x}, y), **QUICK)
    plain = checkup(model.net, nn.CrossEntropyLoss(), (x, y), **QUICK)
    assert report.loss == plain.loss
    assert report.gradient_norm == plain.gradient_norm
