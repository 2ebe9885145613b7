"""One run, from a configuration to a record."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.seed import seed_everything
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from tqdm import tqdm

import models
from acl import akp_parameters
from training import data as datasets
from training.config import check
from training.errors import UsageError
from training.files import write_atomic
from training.loggers import open_logger
from training.records import FORMAT, environment, identity, recorded, run_folder, run_id, write_json

CHECK_EVERY = 50
"""Steps between looks at the loss: each look waits for the device."""


def run(cfg: DictConfig) -> dict[str, Any]:
    """Trains, validates and tests what ``cfg`` (configs/train.yaml) names; gives its record, a recorded run's as it is.

    Raises:
        UsageError: bad input, before any work; or a loss that is no longer finite.
    """
    check(cfg)
    if (record := recorded(cfg)) is not None:
        return record
    try:
        fabric = Fabric(accelerator=cfg.trainer.accelerator, devices=1, precision=cfg.trainer.precision)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"trainer: {error}") from error
    seed_everything(cfg.seed, verbose=False)
    data = datasets.load(cfg.data)
    model = build(cfg, data.channels, data.classes)
    data = data.to(fabric.device)
    conv_parameters, parameters = models.count_parameters(model)
    steps = len(data.train) // cfg.trainer.batch_size
    if steps < 1 or cfg.trainer.epochs < 1:
        raise UsageError(
            f"nothing to train: trainer.epochs={cfg.trainer.epochs}, trainer.batch_size={cfg.trainer.batch_size}, "
            f"{len(data.train)} training images"
        )
    if cfg.trainer.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, cfg)
    schedule = build_schedule(optimizer, cfg, steps * cfg.trainer.epochs)
    net, optimizer = fabric.setup(model, optimizer)

    folder = run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", lambda path: path.write_text(OmegaConf.to_yaml(cfg, resolve=True)))
    logger = open_logger(cfg, folder)
    started = time.perf_counter()
    history: list[dict[str, float]] = []
    best: dict[str, float] = {}
    for epoch in range(cfg.trainer.epochs):
        net.train()
        # Order and augmentation depend on seed and epoch alone.
        generator = torch.Generator().manual_seed(cfg.seed * 100_003 + epoch)
        losses = torch.zeros(steps, device=fabric.device)
        hits = torch.zeros((), device=fabric.device, dtype=torch.long)
        bar = tqdm(
            datasets.batches(data.train, cfg.trainer.batch_size, generator),
            desc=f"epoch {epoch + 1}/{cfg.trainer.epochs}",
            total=steps,
            unit="image",
            unit_scale=cfg.trainer.batch_size,
            leave=False,
            disable=None,
        )
        for step, batch in enumerate(bar):
            images = datasets.augment(batch.images, cfg.data.shift, cfg.data.flip, generator)
            logits = net(prepare(images, data, cfg))
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=cfg.optim.label_smoothing)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
            hits += (logits.detach().argmax(1) == batch.labels).sum()
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
                seen = losses[: step + 1]
                if not bool(seen.isfinite().all()):
                    first = int((~seen.isfinite()).nonzero()[0])
                    raise UsageError(
                        f"the loss is {float(losses[first])} at step {epoch * steps + first + 1} (epoch {epoch + 1}); "
                        f"the last good checkpoint is kept in {folder}; try a lower optim.lr or optim.akp_lr_scale"
                        if history
                        else f"the loss is {float(losses[first])} at step {first + 1}, before a first checkpoint; "
                        "try a lower optim.lr or optim.akp_lr_scale"
                    )
                done = (step + 1) * cfg.trainer.batch_size
                bar.set_postfix(loss=f"{float(seen.mean()):.3f}", top1=f"{100 * int(hits) / done:.2f}%")
        val = evaluate(net, data.val, data, cfg)
        row = {
            "epoch": epoch + 1,
            "lr": schedule.get_last_lr()[0],
            "train_loss": float(losses.mean()),
            "train_top1": 100 * int(hits) / (steps * cfg.trainer.batch_size),
            "val_loss": val["loss"],
            "val_top1": val["top1"],
        }
        history.append(row)
        write_atomic(folder / "metrics.csv", lambda path: _write_csv(path, history))
        logger.log(row)
        if not best or (row["val_top1"], -row["val_loss"]) > (best["val_top1"], -best["val_loss"]):
            best = row
            save_model(folder / "model.safetensors", model)
            write_atomic(folder / "optimizer.pt", lambda path: torch.save(optimizer.state_dict(), path))

    test = None
    if cfg.trainer.test:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        test = evaluate(net, data.test, data, cfg)
    record = {
        "format": FORMAT,
        "id": run_id(cfg),
        "config": identity(cfg),
        "test": test,
        "val": {"top1": best["val_top1"], "loss": best["val_loss"]},
        "best_epoch": best["epoch"],
        "parameters": {"conv": conv_parameters, "total": parameters},
        "seconds": round(time.perf_counter() - started, 2),
        **environment(),
    }
    write_json(folder / "record.json", record)
    logger.close(record)
    return record


def build(cfg: DictConfig, channels: int, classes: int) -> nn.Module:
    """The network of a run. Raises UsageError for an arrangement that does not fit it."""
    arrangement = {name: text for name, text in _flat(cfg.arrangement).items() if text is not None}
    try:
        return models.build(cfg.model.backbone, channels, classes, arrangement, cfg.model.layer)
    except ValueError as error:
        raise UsageError(str(error)) from error


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
def evaluate(net: nn.Module, split: datasets.Split, data: datasets.Data, cfg: DictConfig) -> dict[str, float]:
    """Top-1 accuracy in per cent and mean cross-entropy (nats) over a split."""
    net.eval()
    loss = torch.zeros((), device=split.labels.device, dtype=torch.double)
    hits = torch.zeros((), device=split.labels.device, dtype=torch.long)
    for batch in datasets.batches(split, 1000):
        logits = net(prepare(batch.images, data, cfg))
        loss += F.cross_entropy(logits, batch.labels, reduction="sum")
        hits += (logits.argmax(1) == batch.labels).sum()
    return {"top1": 100 * int(hits) / len(split), "loss": float(loss) / len(split)}


def save_model(path: Path, model: nn.Module) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, lambda temporary: save_file(state, temporary))


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
