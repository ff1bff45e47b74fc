"""Several processes: each its own images and memory bank, all the same weights; figures as of a single one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

import processes  # noqa: E402
from processes import differences  # noqa: E402
from test_train import pictures, tiny  # noqa: E402, F401
from test_trust import result  # noqa: E402

from sadcl.checkpoint import load_checkpoint, restore_model  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.metrics import MultilabelAccumulator  # noqa: E402
from sadcl.train import distributed, loop  # noqa: E402
from sadcl.train.build import make_loss  # noqa: E402
from sadcl.train.config import LossConfig, TrainConfig  # noqa: E402
from sadcl.train.loop import Stage, evaluate, make_stage, train_epoch  # noqa: E402
from sadcl.train.order import ShuffledBatches  # noqa: E402
from sadcl.train.run import Run  # noqa: E402

if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

# 24 images, 12 a process, in batches of 5, 5 and 2; enough of step 1 for the bank to take features up.
RECIPE = {"batch_size": 5, "checkpoint_every": 1, "ema__decay": 0.9, "step2__accumulate": 2, "control": "false"}
LEARNED = {"step1__epochs": 6, "step1__learning_rate": 1e-2, "model__dropout": 0.1}


def both(config: TrainConfig) -> str:
    return processes.said(config) + processes.said(config, 1)


@pytest.fixture(scope="module")
def pair(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:  # noqa: F811
    """A finished run of two processes."""
    config = tiny(pictures, tmp_path_factory.mktemp("pair") / "run", **RECIPE, **LEARNED)
    assert processes.run(config, processes=2, function=_train_and_keep) == [0, 0], both(config)
    return config


def _train_and_keep(arguments: list[str]) -> int:
    """The command; every process then keeps its own model as it is at the end of training."""
    kept: dict[str, Any] = {}
    save = Run._save_last

    def save_and_keep(self: Run, stage: Stage) -> None:
        save(self, stage)
        kept.update(folder=self.folder, model=self.model.state_dict(), ema=stage.ema.module.state_dict())

    Run._save_last = save_and_keep  # type: ignore[method-assign]
    code = main(arguments)
    folder = kept.pop("folder")
    torch.save(kept, folder.with_name(f"{folder.name}.{os.environ['RANK']}.pt"))
    return code


def own(config: TrainConfig, rank: int) -> dict[str, Any]:
    """What a process had in the end."""
    return torch.load(Path(config.output).with_name(f"run.{rank}.pt"), weights_only=True)


def test_only_the_main_process_speaks_and_writes(pair: TrainConfig) -> None:
    assert "done in" in processes.said(pair) and processes.said(pair, 1) == ""
    assert not list(Path(pair.output).glob(".*"))


def test_processes_end_with_the_same_weights_but_other_banks(pair: TrainConfig) -> None:
    main, other = own(pair, 0), own(pair, 1)
    assert differences(main["model"], other["model"]) == ["/head.memory_bank.slots"]
    assert differences(main["ema"], other["ema"]) == ["/head.memory_bank.slots"]
    last = load_checkpoint(Path(pair.output) / "last.pt")
    assert differences(last["model"], main["model"]) == []
    assert torch.equal(last["others"][0]["bank"], other["model"]["head.memory_bank.slots"])
    assert not torch.equal(last["others"][0]["rng"]["torch"], last["training"]["rng"]["torch"]), "the same dropout"


def test_evaluation_is_that_of_a_single_process(pair: TrainConfig) -> None:
    """Same weights, 12 images in shares of 12 and 0 (one batch): every image once, the same to the last bit."""
    metrics = json.loads((Path(pair.output) / "metrics.json").read_text())
    alone = Run(pair, lambda line: None)
    for name in ("step1", "step2"):
        model = restore_model(load_checkpoint(Path(pair.output) / f"{name}.pt"))
        report = evaluate(model, model.head, alone.val_batches(), torch.device("cpu"))
        assert json.loads(json.dumps(report.as_dict())) == metrics["stages"][name]


def test_evaluation_in_uneven_shares(tmp_path: Path) -> None:
    """23 items in batches of 4: 12 and 11 of them; no item is counted twice, and their order is kept."""
    assert processes.group(_uneven, tmp_path) == [0, 0]
    scores, labels = _items()
    for path in sorted(tmp_path.glob("*.pt")):
        seen = torch.load(path, weights_only=True)
        assert torch.equal(seen["scores"], scores) and torch.equal(seen["labels"].float(), labels)


def _items() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(23, 3, generator=generator), (torch.rand(23, 3, generator=generator) < 0.5).float()


def _uneven(folder: Path) -> None:
    scores, labels = _items()
    with distributed.joined():
        for batch_size in (23, 100, 4):  # with 23 and 100 the second process has nothing
            seen, shard = MultilabelAccumulator(), distributed.BatchShard(23, batch_size)
            for batch in shard:
                seen.update(scores[batch], labels[batch])
            assert len(seen) == {4: (12, 11), 23: (23, 0), 100: (23, 0)}[batch_size][distributed.rank()]
            distributed.gather_scores(seen, shard)
            torch.save({"scores": seen.scores, "labels": seen.labels}, folder / f"{distributed.rank()}.{batch_size}.pt")


def test_gradient_is_the_mean_over_the_processes(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """One step of SGD by two processes against the mean of two gradients, each of one process's batch."""
    assert processes.group(_one_step, tmp_path, pictures) == [0, 0]
    start, mine, theirs = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("start", "0", "1"))
    assert differences(mine["after"], theirs["after"]) == []
    assert set(mine["alone"]) < set(start)
    for name in mine["alone"]:
        before = start[name]
        mean = (mine["alone"][name] + theirs["alone"][name]) / 2
        assert not torch.equal(mine["alone"][name], theirs["alone"][name]), "both had the same images"
        torch.testing.assert_close(mine["after"][name], before - 0.1 * mean, rtol=1e-6, atol=1e-7)


def _one_step(folder: Path, pictures: Path) -> None:  # noqa: F811
    with distributed.joined():
        _step_of_this_process(folder, pictures)


def _step_of_this_process(folder: Path, pictures: Path, batch: str = "local") -> None:  # noqa: F811
    rank = distributed.rank()
    config = tiny(pictures, folder / "run", batch_size=12, model__dropout=0)
    config.step2.optimizer, config.step2.schedule, config.step2.learning_rate = "sgd", "constant", 0.1
    config.step2.weight_decay = config.step2.momentum = 0.0
    config.loss.batch = batch  # type: ignore[assignment]
    run = Run(config, lambda line: None)
    run.model.head.init_contrastive(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), 12)
    if batch == "local":  # nearly parallel embeddings, whose differences float32 rounds away
        nn.init.constant_(run.model.head.projection.layers[0].weight, 0.01 * (rank + 1))  # made equal by DDP
    stage = make_stage(run.model, run.train_set, config.step2, 12, 5, 0)
    forward = distributed.parallel(run.model.head, run.device)
    if rank == 0:
        torch.save({name: value.clone() for name, value in run.model.head.state_dict().items()}, folder / "start.pt")
    # What this process's batch alone asks for, or both in one process.
    loss, bank = make_loss(config.loss), run.model.head.memory_bank
    assert bank is not None
    banks = [torch.randn(bank.slots.shape, generator=torch.Generator().manual_seed(7 + one)) for one in range(2)]
    parts = [next(iter(ShuffledBatches(24, 12, 5, one, 2))) for one in range(2)]
    indices = parts[rank] if batch == "local" else [*parts[0], *parts[1]]
    bank.slots = banks[rank] if batch == "local" else torch.cat(banks)
    images, labels = (torch.stack(part) for part in zip(*[run.train_set[i] for i in indices], strict=True))
    output = run.model.head(images, contrastive=True)
    one_process = make_loss(LossConfig())
    total = one_process(
        output.embeddings, output.bank_embeddings, output.prototype_embeddings, labels, output.logits
    ).total
    names, weights = zip(*run.model.head.named_parameters(), strict=True)
    alone = dict(zip(names, torch.autograd.grad(total, weights), strict=True))
    bank.slots = banks[rank]
    train_epoch(run.model, forward, stage, loss, contrastive=True, device=run.device)
    after = dict(run.model.head.named_parameters())
    torch.save(
        {"alone": alone, "after": {name: value.detach() for name, value in after.items()}}, folder / f"{rank}.pt"
    )


def test_gradient_of_the_global_batch_is_one_processs(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """One step of SGD by two processes against that of one with both batches and both banks."""
    assert processes.group(_one_global_step, tmp_path, pictures) == [0, 0]
    start, mine, theirs = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("start", "0", "1"))
    assert differences(mine["after"], theirs["after"]) == []
    assert differences(mine["alone"], theirs["alone"]) == []
    for name in mine["alone"]:
        grad = mine["alone"][name]
        off = (mine["after"][name] - start[name] + 0.1 * grad).abs().max()
        assert off <= 1e-6 * (0.1 * grad.abs().max() + start[name].abs().max()), name


def _one_global_step(folder: Path, pictures: Path) -> None:  # noqa: F811
    with distributed.joined():
        _step_of_this_process(folder, pictures, batch="global")


GLOBAL = {
    "loss__batch": "global", "batch_size": 5, "checkpoint_every": 1, "control": "false", "step1__epochs": 1,
    "step2__epochs": 2, "model__dropout": 0.1,
}  # fmt: skip


def test_killed_and_resumed_with_the_global_batch(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, killed, local = (tiny(pictures, tmp_path / name, **GLOBAL) for name in ("whole", "killed", "local"))
    local.loss.batch = "local"
    assert processes.run(whole, processes=2) == [0, 0], both(whole)
    moment = ("sadcl.train.loop:Stage.step", 6, "before")
    assert processes.run(killed, processes=2, kill=moment) == [-9, -9], both(killed)
    assert load_checkpoint(Path(killed.output) / "last.pt")["stage"] == "step2"
    assert processes.run(killed, "--resume", processes=2) == [0, 0], both(killed)
    assert differences(result(killed), result(whole)) == []
    assert processes.run(local, processes=2) == [0, 0], both(local)
    assert differences(result(local), result(whole)) != []


def test_an_epoch_is_dealt_out_without_overlap() -> None:
    whole = next(iter(ShuffledBatches(25, 100, seed=4)))
    parts = [list(ShuffledBatches(25, 4, 4, rank, 3)) for rank in range(3)]
    assert [[len(batch) for batch in part] for part in parts] == [[4, 4]] * 3
    taken = [image for part in parts for batch in part for image in batch]
    assert len(set(taken)) == 24 and set(taken) == set(whole[:24])
    with pytest.raises(ValueError, match="at least one for each of 3 processes"):
        ShuffledBatches(2, 4, 0, 0, 3)


# -- killed, failing --


def test_killed_and_resumed_is_the_same_run(pair: TrainConfig, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """In the middle of an epoch of step 1, and of step 2, where the banks differ."""
    config = tiny(pictures, tmp_path / "run", **RECIPE, **LEARNED)
    for step, count in (("step1", 4), ("step2", 18)):
        moment = ("sadcl.train.loop:Stage.step", count, "before")
        assert processes.run(config, "--resume", processes=2, kill=moment) == [-9, -9], both(config)
        assert load_checkpoint(Path(config.output) / "last.pt")["stage"] == step
    assert processes.run(config, "--resume", processes=2, function=_train_and_keep) == [0, 0], both(config)
    assert differences(result(config), result(pair)) == []
    for rank in range(2):
        assert differences(own(config, rank), own(pair, rank)) == [], f"process {rank}"


def test_another_number_of_processes_cannot_resume(pair: TrainConfig) -> None:
    assert processes.run(pair, "--resume") == [2]
    assert "was started with 2 processes, not 1" in processes.said(pair)


def test_one_process_dies_and_the_other_stops(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tiny(pictures, tmp_path / "run", **RECIPE, step1__epochs=10_000)
    started = processes.start(config, processes=2)
    processes.wait_for(config, "epoch 1/")
    started[1].kill()
    assert processes.finish(started) == [2, -9]
    said = processes.said(config)
    assert "error (process 0 of 2): process 0 of 2 stops: another one did" in said and "Traceback" not in said
    load_checkpoint(Path(config.output) / "last.pt")


def test_unreadable_picture_of_one_process_stops_both(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    mine = tmp_path / "pictures"
    shutil.copytree(pictures, mine)
    picture = mine / f"{list(ShuffledBatches(24, 5, 0, 1, 2))[1][0]}.png"  # of the second process
    picture.write_bytes(b"no picture")
    config = tiny(mine, tmp_path / "run", **RECIPE, model__train_backbone="true")
    assert processes.run(config, processes=2) == [2, 2]
    assert f"error (process 1 of 2): {picture}: not a picture" in processes.said(config, 1)
    assert "another one did" in processes.said(config)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_in_one_process_stops_both(pictures: Path, tmp_path: Path, what: str) -> None:  # noqa: F811
    """The average over the processes is as infinite in one as in the other: only one has the batch."""
    config = tiny(pictures, tmp_path / "run", **RECIPE)
    spoilt = {"loss": _one_loss_is_nan, "gradient": _one_gradient_is_infinite}[what]
    assert processes.run(config, processes=2, function=spoilt) == [2, 2]
    assert "the loss or gradient of another process is not finite" in processes.said(config)
    assert f"the {what} is not finite" in processes.said(config, 1) and "nonfinite.1.pt" in processes.said(config, 1)
    assert [path.name for path in Path(config.output).glob("nonfinite*")] == ["nonfinite.1.pt"]


def _one_loss_is_nan(arguments: list[str]) -> int:
    return _spoilt(arguments, lambda value: value * float("nan"))


def _one_gradient_is_infinite(arguments: list[str]) -> int:
    return _spoilt(arguments, lambda value: value + 0 * (value - value.detach()).sqrt())  # d sqrt(0) = inf


def _spoilt(arguments: list[str], change: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """The command; the second process's losses are changed."""
    if os.environ["RANK"] == "1":
        real = loop._losses
        loop._losses = lambda *given: {name: change(value) for name, value in real(*given).items()}
    return main(arguments)


def test_torchrun(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """The command as it is in the documentation, with a backbone that is trained."""
    recipe = {"step1__epochs": 1, "step2__epochs": 1, "control": "false", "eval_image_size": 96}
    config = tiny(pictures, tmp_path / "run", **recipe, model__train_backbone="true")
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, "-m", "sadcl.train", "--config", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert set(metrics["stages"]) == set(metrics["at_96"]) == {"step1", "step2"}
    assert done.stderr.count("epoch 1/1") + done.stdout.count("epoch 1/1") == 2  # once a step
