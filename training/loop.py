"""One run, from a configuration to a record."""

import csv
import io
import logging
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from lightning_fabric.utilities.seed import seed_everything
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from tqdm import tqdm

import models
from acl import AnalyticConv2d, akp_parameters
from training import checkpoint
from training import data as datasets
from training.config import check, one_line
from training.errors import UsageError
from training.files import alone_in, write_atomic
from training.loggers import Logger, open_logger
from training.records import FORMAT, environment, identity, recorded, run_folder, run_id, write_json

warnings.filterwarnings("ignore", message="The `srun` command is available")  # right for a single process
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells the precision of each run of a table

CHECK_EVERY = 50
"""Steps between looks at the loss: each look waits for the device."""
EVAL_PIXELS = 2**24
"""Pixels in a batch of evaluation, at most."""


@dataclass
class Progress:
    """Where a run is, beside the states of model, optimiser, schedule and generators."""

    losses: torch.Tensor  # (steps,) of this epoch; each process has its share of the mean
    hits: torch.Tensor  # () training images of this epoch that were told right
    epoch: int = 0  # done
    step: int = 0  # done, of this epoch
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    akps: list[dict[str, torch.Tensor]] = field(default_factory=list)  # at the start and after each epoch
    seconds: float = 0.0


def run(cfg: DictConfig) -> tuple[dict[str, Any], bool]:
    """Trains, validates and tests what ``cfg`` (configs/train.yaml) names, unless that is recorded already.

    A run that was cut off goes on from its last checkpoint and ends as one that never was.

    Returns:
        The run's record, and whether it was done here and now.

    Raises:
        UsageError: bad input, before any work; a loss that is no longer finite; a folder that cannot be written.
        BusyError: another process is at this run.
    """
    check(cfg)
    if (record := recorded(cfg)) is not None:
        return record, False
    fabric = build_fabric(cfg)
    data = datasets.load(cfg.data)
    steps = len(data.train) // cfg.trainer.batch_size
    if steps < 1 or cfg.trainer.batch_size < fabric.world_size:
        raise UsageError(
            f"nothing to train: trainer.batch_size={cfg.trainer.batch_size}, {len(data.train)} training images, "
            f"{fabric.world_size} processes"
        )
    seed_everything(cfg.seed, verbose=False)
    model = build(cfg, data)
    folder = run_folder(cfg)
    # One process of a run writes, so one holds its lock; it starts the others only once it does.
    with alone_in(folder) if getattr(rank_zero_only, "rank", 0) == 0 else nullcontext():
        if (record := recorded(cfg)) is not None:  # another worker finished it since
            return record, False
        fabric.launch()
        return _train(cfg, fabric, model, data.to(fabric.device), steps, folder), True


def _train(
    cfg: DictConfig, fabric: Fabric, model: nn.Module, data: datasets.Data, steps: int, folder: Path
) -> dict[str, Any]:
    """The loop: from the start or the last checkpoint to the record. ``steps`` are those of an epoch."""
    size, rank, world, writes = cfg.trainer.batch_size, fabric.global_rank, fabric.world_size, fabric.is_global_zero
    conv_parameters, parameters = models.count_parameters(model)
    if cfg.trainer.channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.trainer.compile:
        model.compile()
    optimizer = build_optimizer(model, cfg)
    schedule = build_schedule(optimizer, cfg, steps * cfg.trainer.epochs)
    net, optimizer = fabric.setup(model, optimizer)
    generator = torch.Generator()
    now = Progress(torch.zeros(steps, device=fabric.device), torch.zeros((), dtype=torch.long, device=fabric.device))
    if (saved := checkpoint.load(folder)) is not None:
        if saved["config"] != identity(cfg):
            raise UsageError(f"{folder} has a checkpoint of another configuration; move it away to run this one")
        now = Progress(**{name: fabric.to_device(saved[name]) for name in vars(now)})
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(saved[name])
        set_random_state(fabric, saved["random"])
        now.hits *= rank == 0  # the checkpoint has the sum over processes
    else:
        now.akps.append(akps_of(model))
        if writes:
            write_atomic(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    saved_at = time.monotonic()
    started = saved_at - now.seconds

    def save_checkpoint() -> float:
        now.seconds = time.monotonic() - started
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state |= {"config": identity(cfg), "generator": generator.get_state(), "random": random_state(fabric)}
        state["losses"] = over_processes(fabric, now.losses, "mean")
        state["hits"] = over_processes(fabric, now.hits, "sum")
        if writes:
            checkpoint.save(folder, {**vars(now), **state})
        return time.monotonic()

    with open_logger(cfg, folder, model) if writes else Logger() as logger:
        logger.start(now.epoch)
        while now.epoch < cfg.trainer.epochs:
            net.train()
            # Order, augmentation and dropout of an epoch depend on seed, epoch and process alone.
            generator.manual_seed(cfg.seed * 100_003 + now.epoch)
            order = torch.randperm(len(data.train), generator=generator).to(data.train.images.device)
            if now.step:
                assert saved is not None
                generator.set_state(saved["generator"])
            else:
                torch.manual_seed((cfg.seed * 100_003 + now.epoch) * 1009 + rank)
                now.losses.zero_()
                now.hits.zero_()
            bar = tqdm(
                range(now.step, steps),
                desc=f"epoch {now.epoch + 1}/{cfg.trainer.epochs}",
                initial=now.step,
                total=steps,
                unit="image",
                unit_scale=size,
                leave=False,
                disable=None if writes else True,
            )
            for step in bar:
                batch = data.train[order[step * size : (step + 1) * size]].to(fabric.device)
                images = datasets.augment(batch.images, cfg.data, generator)
                images, labels = images[rank::world], batch.labels[rank::world]
                logits = net(prepare(images, data, cfg))
                loss = F.cross_entropy(logits, labels, label_smoothing=cfg.optim.label_smoothing)
                loss = loss * (len(labels) * world / size)  # the mean over processes is then that over the batch
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                schedule.step()
                now.losses[step] = loss.detach()
                now.hits += (logits.detach().argmax(1) == labels).sum()
                now.step = step + 1
                if now.step % CHECK_EVERY == 0 or now.step == steps:
                    losses = over_processes(fabric, now.losses[: now.step], "mean")
                    _stop_if_not_finite(losses, now, steps, folder)
                    shown = 100 * int(now.hits) * world / (now.step * size)
                    bar.set_postfix(loss=f"{float(losses.mean()):.3f}", top1=f"{shown:.2f}%")
                    due = torch.tensor(float(time.monotonic() - saved_at > 60 * cfg.trainer.checkpoint_minutes))
                    if now.step < steps and float(over_processes(fabric, due, "max")):
                        saved_at = save_checkpoint()
            val = evaluate(net, data.val, data, cfg, fabric)
            row = {
                "epoch": now.epoch + 1,
                "lr": schedule.get_last_lr()[0],
                "train_loss": float(losses.mean()),
                "train_top1": 100 * int(over_processes(fabric, now.hits, "sum")) / (steps * size),
                "val_loss": val["loss"],
                "val_top1": val["top1"],
            }
            better = not now.best or (val["top1"], -val["loss"]) > (now.best["val_top1"], -now.best["val_loss"])
            now.best = row if better else now.best
            now.history.append(row)
            now.akps.append(akps_of(model))
            now.epoch, now.step = now.epoch + 1, 0
            if writes:
                if better:
                    save_model(folder / "model.safetensors", model)
                    write_atomic(folder / "optimizer.pt", checkpoint.to_bytes(optimizer.state_dict()))
                write_atomic(folder / "metrics.csv", _csv(now.history))
                if now.akps[0]:
                    paths = {name: torch.stack([akps[name] for akps in now.akps]) for name in now.akps[0]}
                    write_atomic(folder / "akps.safetensors", save(paths))
            logger.log(row)
            saved_at = save_checkpoint()

        fabric.barrier()
        test = None
        if cfg.trainer.test:
            model.load_state_dict(load_file(folder / "model.safetensors"))
            test = evaluate(net, data.test, data, cfg, fabric)
        record = {
            "format": FORMAT,
            "id": run_id(cfg),
            "config": identity(cfg),
            "test": test,
            "val": {"top1": now.best["val_top1"], "loss": now.best["val_loss"]},
            "best_epoch": now.best["epoch"],
            "parameters": {"conv": conv_parameters, "total": parameters},
            "seconds": round(time.monotonic() - started, 2),
            **environment(),
        }
        if writes:
            write_json(folder / "record.json", record)
            checkpoint.delete(folder)
        logger.finish(record)
    return record


def _stop_if_not_finite(losses: torch.Tensor, now: Progress, steps: int, folder: Path) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        kept = f"the last good checkpoint is kept in {folder}; " if now.history else ""
        raise UsageError(
            f"the loss is {float(losses[first])} at step {now.epoch * steps + first + 1} (epoch {now.epoch + 1}); "
            f"{kept}try a lower optim.lr or optim.akp_lr_scale"
        )


def build_fabric(cfg: DictConfig) -> Fabric:
    """The processes and devices of a run. Raises UsageError for more of them than there are."""
    trainer = cfg.trainer
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        fabric = Fabric(
            accelerator=trainer.accelerator,
            strategy=trainer.strategy,
            devices=trainer.devices,
            num_nodes=trainer.nodes,
            precision=trainer.precision,
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
    if fabric.device.type == "cpu" and trainer.devices > (os.cpu_count() or 1):
        raise UsageError(f"trainer.devices={trainer.devices} is more than the {os.cpu_count()} cores of this machine")
    return fabric


def over_processes(fabric: Fabric, tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The "sum", "mean" or "max" of a tensor over the processes of a run."""
    reduced = fabric.all_reduce(fabric.to_device(tensor).clone(), reduce_op=how)  # it works in place
    assert isinstance(reduced, torch.Tensor)
    return reduced


def random_state(fabric: Fabric) -> torch.Tensor:
    """(processes, n): the state of each process's random numbers, for dropout and the like."""
    on_gpu = fabric.device.type == "cuda"
    own = torch.cuda.get_rng_state(fabric.device) if on_gpu else torch.get_rng_state()
    gathered = fabric.all_gather(own)
    assert isinstance(gathered, torch.Tensor)
    return gathered.reshape(fabric.world_size, -1).cpu()


def set_random_state(fabric: Fabric, states: torch.Tensor) -> None:
    own = states[fabric.global_rank % len(states)].clone()  # a run may go on with more processes
    torch.cuda.set_rng_state(own, fabric.device) if fabric.device.type == "cuda" else torch.set_rng_state(own)


def build(cfg: DictConfig, data: datasets.Data) -> nn.Module:
    """The network of a run.

    Raises:
        UsageError: an arrangement that does not fit it, weights that are not to be had, or images that it cannot take.
    """
    arrangement = {name: text for name, text in _flat(cfg.arrangement).items() if text is not None}
    try:
        model = models.build(channels=data.channels, classes=data.classes, arrangement=arrangement, **cfg.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    image = data.normalise(datasets.centre(data.train.images[:1], cfg.data))
    try:
        with torch.no_grad():
            model.eval()(image)
    except Exception as error:
        raise UsageError(
            f"model.backbone={cfg.model.backbone} does not take images of {' x '.join(map(str, image.shape[1:]))}: "
            f"{one_line(error)}"
        ) from error
    return model.train()


def run_of(folder: Path) -> Path:
    """A run's folder, also by its mere id where it is in ``runs/``."""
    return here if not folder.exists() and (here := Path("runs") / folder).exists() else folder


def finished(folder: Path, **data: Any) -> tuple[DictConfig, datasets.Data, nn.Module]:
    """A finished run's configuration, data and trained network (its best epoch), in eval mode.

    Args:
        folder: the run's, as ``run_of`` takes it.
        data: what to change of the data's configuration, as ``root``, where that is elsewhere now; None for nothing.

    Raises:
        UsageError: no such run, one that is not finished, or data that are not there.
    """
    folder = run_of(folder)
    for name, what in (("config.yaml", "is no folder of a run"), ("record.json", "has a run that is not finished")):
        if not (folder / name).exists():
            raise UsageError(f"{folder} {what}: it has no {name}")
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.data.update({name: value for name, value in data.items() if value is not None})
    loaded = datasets.load(cfg.data)
    bare = cfg.copy()
    if "pretrained" in cfg.model and "auto" not in _flat(cfg.arrangement).values():
        bare.model.pretrained = False  # the run's own weights come instead
    seed_everything(cfg.seed, verbose=False)  # auto chooses its kinds by the weights that a run begins with
    model = build(bare, loaded)
    weights = folder / "model.safetensors"
    try:
        # Layers without a plain kernel once kept an empty parameter for it.
        model.load_state_dict({name: t for name, t in load_file(weights).items() if t.numel()})
    except Exception as error:
        raise UsageError(f"{weights} does not fit the network of {folder}: {one_line(error)}") from error
    return cfg, loaded, model.eval()


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots: a layer's name has dots, and a configuration reads them as levels."""
    if not isinstance(node, DictConfig):
        return {prefix: node}
    start = f"{prefix}." if prefix else ""
    return {k: v for name in map(str, node) for k, v in _flat(node[name], start + name).items()}


def build_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.Optimizer:
    """Three groups: AKPs with a learning rate of their own, weights with decay, and the rest without."""
    optim = cfg.optim
    akps = [p for p in akp_parameters(model) if p.requires_grad]
    known = {id(p) for p in akp_parameters(model)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": optim.lr, "weight_decay": optim.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "lr": optim.lr, "weight_decay": 0.0},
        {"params": akps, "lr": optim.lr * optim.akp_lr_scale, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, fused=True)
    raise UsageError(f"unknown optim.name '{optim.name}'; known: adamw, sgd")


def build_schedule(optimizer: torch.optim.Optimizer, cfg: DictConfig, steps: int) -> LRScheduler:
    if cfg.optim.schedule == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=False)
    if cfg.optim.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    raise UsageError(f"unknown optim.schedule '{cfg.optim.schedule}'; known: onecycle, cosine")


def prepare(images: torch.Tensor, data: datasets.Data, cfg: DictConfig) -> torch.Tensor:
    """uint8 images of a batch -> what the network takes."""
    layout = torch.channels_last if cfg.trainer.channels_last else torch.contiguous_format
    return data.normalise(images).contiguous(memory_format=layout)


@torch.no_grad()
def evaluate(
    net: nn.Module, split: datasets.Split, data: datasets.Data, cfg: DictConfig, fabric: Fabric | None = None
) -> dict[str, float]:
    """Top-1 accuracy in per cent and mean cross-entropy (nats) over a split, which the processes of a run share."""
    net.eval()
    mine = slice(None) if fabric is None else slice(fabric.global_rank, None, fabric.world_size)
    sums = torch.zeros(2, dtype=torch.double, device=data.mean.device)
    size = max(1, min(1000, EVAL_PIXELS // datasets.centre(split.images[:1], cfg.data)[0, 0].numel()))
    for held in datasets.batches(datasets.Split(split.images[mine], split.labels[mine]), size):
        batch = held.to(sums.device)
        logits = net(prepare(datasets.centre(batch.images, cfg.data), data, cfg))
        sums[0] += (logits.argmax(1) == batch.labels).sum()
        sums[1] += F.cross_entropy(logits, batch.labels, reduction="sum")
    if fabric is not None:
        sums = over_processes(fabric, sums, "sum")
    return {"top1": 100 * int(sums[0]) / len(split), "loss": float(sums[1]) / len(split)}


def save_model(path: Path, model: nn.Module) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(state))


def akps_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """<layer>/<symbol>/<akp> -> its values in natural units (px, rad), (count,), on the CPU."""
    return {
        f"{layer}/{symbol}/{akp}": values.detach().to("cpu", torch.float32, copy=True)
        for layer, module in model.named_modules()
        if isinstance(module, AnalyticConv2d)
        for symbol, akps in module.akps().items()
        for akp, values in akps.items()
    }


def _csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
