"""Whatever a framework is told to do, the norms are those of the plain loop."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from conditioning import GradientNorms
from tests.frameworks import (
    RTOL,
    RTOL_BFLOAT16,
    SAMPLES,
    Problem,
    fresh_accelerator,
    lightning_module,
    lightning_options,
    quiet,
    sgd,
    training_arguments,
)


@pytest.fixture
def problem():
    torch._dynamo.reset()
    return Problem()


@pytest.fixture
def make_accelerator():
    with fresh_accelerator() as make:
        yield make


def first_key(options):
    return next(iter(options), "default")


@quiet["dynamo"]
@quiet["lightning"]
class TestLightning:
    @pytest.mark.parametrize(
        "options",
        [
            {"manual": True},
            {"precision": "bf16-mixed"},
            {"gradient_clip_val": 0.1},
            {"compile": True},
            {"accumulate_grad_batches": 4},
        ],
        ids=first_key,
    )
    def test_norms_are_those_of_the_plain_loop(self, problem, tmp_path, options):
        lightning = pytest.importorskip("lightning")
        options = dict(options)
        module = lightning_module(problem.net, manual=options.pop("manual", False))
        if options.pop("compile", False):
            module.net.compile(backend="eager")
        parts = options.get("accumulate_grad_batches", 1)
        with GradientNorms(module, "net.blocks.*") as norms:
            trainer = lightning.Trainer(**lightning_options(tmp_path, **options))
            trainer.fit(module, problem.loader(3, parts))
        assert norms.num_steps == trainer.global_step == 3
        problem.check_first_step(norms, RTOL_BFLOAT16 if "precision" in options else RTOL)
        assert norms.to_frame().call.max() == parts - 1

    def test_validation_and_checkpoints_in_between(self, problem, tmp_path):
        lightning = pytest.importorskip("lightning")

        class Copies(lightning.Callback):
            def on_train_batch_end(self, _trainer, module, *_):
                torch.save(module.net, tmp_path / "net.pt")
                copy.deepcopy(module.net)(problem.data.tensors[0]).sum().backward()

        module = lightning_module(problem.net)
        type(module).validation_step = lambda self, batch, _: self.net(batch[0])
        checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
        options = lightning_options(
            tmp_path, callbacks=[Copies(), checkpoint], enable_checkpointing=True,
            val_check_interval=1,
        )  # fmt: skip
        with GradientNorms(module, "net.blocks.*") as norms:
            lightning.Trainer(**options).fit(module, problem.loader(3), problem.loader(1))
        assert norms.num_steps == 3
        problem.check_first_step(norms)
        assert norms.to_frame().call.max() == 0
        loaded = torch.load(tmp_path / "net.pt", weights_only=False)
        assert all(torch.equal(a, b) for a, b in zip(
            loaded.state_dict().values(), problem.net.state_dict().values(), strict=True
        ))  # fmt: skip

    def test_a_step_that_the_scaler_skips(self, problem, tmp_path):
        lightning = pytest.importorskip("lightning")
        from lightning.pytorch.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        module = lightning_module(problem.net, overflow_in=1)
        with GradientNorms(module, "net.blocks.*", scaler=scaler) as norms:
            options = lightning_options(tmp_path, plugins=[plugin])
            lightning.Trainer(**options).fit(module, problem.loader(4))
        assert norms.num_steps == 4
        problem.check_first_step(norms, rel=0.02)
        assert norms.ratios().isna().all(axis=1).tolist() == [False, True, False, False]


@quiet["dynamo"]
@quiet["transformers"]
class TestTrainer:
    @pytest.mark.parametrize(
        "options",
        [
            {"bf16": True},
            {"torch_compile": True, "torch_compile_backend": "eager"},
            {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
            {"max_grad_norm": 0.01},
            {"gradient_accumulation_steps": 4, "per_device_train_batch_size": SAMPLES // 4},
        ],
        ids=first_key,
    )
    def test_norms_are_those_of_the_plain_loop(self, problem, tmp_path, options):
        transformers = pytest.importorskip("transformers")
        arguments = training_arguments(tmp_path, **options)
        trainer = transformers.Trainer(
            problem.net, arguments, train_dataset=problem.rows, eval_dataset=problem.rows
        )
        with GradientNorms(problem.net, "blocks.*") as norms:
            trainer.train()
        assert norms.num_steps == trainer.state.global_step == 3
        problem.check_first_step(norms, RTOL_BFLOAT16 if "bf16" in options else RTOL)

    def test_what_the_trainer_says_of_gradients_is_not_changed(self, problem, tmp_path):
        transformers = pytest.importorskip("transformers")
        said = []
        for tracked in (False, True):
            model = copy.deepcopy(problem.net)
            trainer = transformers.Trainer(
                model, training_arguments(tmp_path), train_dataset=problem.rows
            )
            with GradientNorms(model, "blocks.*") if tracked else contextlib.nullcontext():
                trainer.train()
            logs = [logs for logs in trainer.state.log_history if "grad_norm" in logs]
            said.append([(line["loss"], line["grad_norm"]) for line in logs])
        assert len(said[0]) == 3
        assert said[0] == said[1]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_norm(self, tmp_path, reentrant):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM",
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(50, (SAMPLES, 10))]
        ratios = []
        for checkpointing in (False, True):
            mine = copy.deepcopy(model)
            if checkpointing:
                mine.gradient_checkpointing_enable({"use_reentrant": reentrant})
            with GradientNorms(mine) as norms:
                arguments = training_arguments(tmp_path)
                transformers.Trainer(mine, arguments, train_dataset=rows).train()
            ratios.append(norms.ratios())
        assert list(ratios[0].columns) == [f"transformer.h.{index}" for index in range(3)]
        assert ratios[1].to_numpy() == pytest.approx(ratios[0].to_numpy(), rel=RTOL)


@quiet["dynamo"]
class TestAccelerate:
    @pytest.mark.parametrize("before", [False, True], ids=["prepared", "before prepare"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"mixed_precision": "bf16"},
            {"dynamo_backend": "eager"},
            {"gradient_accumulation_steps": 4},
        ],
        ids=first_key,
    )
    def test_norms_are_those_of_the_plain_loop(self, make_accelerator, problem, options, before):
        accelerator = make_accelerator(**options)
        parts = options.get("gradient_accumulation_steps", 1)
        model, optimizer, loader = accelerator.prepare(
            problem.net, sgd(problem.net), problem.loader(3, parts)
        )
        with GradientNorms(problem.net if before else model, "blocks.*") as norms:
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
        assert norms.num_steps == 3
        problem.check_first_step(norms, RTOL_BFLOAT16 if "mixed_precision" in options else RTOL)
        assert norms.to_frame().call.max() == parts - 1

    def test_a_step_that_the_scaler_skips(self, make_accelerator, problem):
        from accelerate.optimizer import AcceleratedOptimizer

        make_accelerator()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = AcceleratedOptimizer(sgd(problem.net), scaler=scaler)
        inputs, labels = problem.data.tensors
        with GradientNorms(problem.net, "blocks.*", scaler=scaler) as norms:
            for factor in (1.0, math.inf, 1.0):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(problem.net(inputs), labels)
                scaler.scale(loss * factor).backward()
                optimizer.step()
        assert norms.num_steps == 3
        problem.check_first_step(norms)
        assert norms.ratios().isna().all(axis=1).tolist() == [False, True, False]
