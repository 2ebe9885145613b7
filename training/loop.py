"""Training, validating and testing one run."""

import base64
import csv
import functools
import hashlib
import io
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.seed import seed_everything
from omegaconf import OmegaConf
from safetensors.torch import load_file, save
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

import models
from acl import analytic_layers
from models.library import find_random_layers
from training.checkpoint import Checkpointer, TrainState, serialize_weights
from training.data import Data
from training.distributed import all_reduce, build_fabric, is_main_process, synchronize_batch_norm
from training.errors import UsageError
from training.evaluate import predict
from training.loggers import Logger, check_logger, open_logger
from training.optim import build_criterion, build_optimizer, build_schedule
from training.provenance import describe_environment, digest_file
from training.record import RECORD_FORMAT, Record
from training.run_directory import RunDirectory, serialize
from training.settings import RunSettings, build_model, describe_inputs, find_changes, load_run_data
from training.splits import Split
from training.validation import construct

CHECK_EVERY = 50  # steps between checks of the loss; each check synchronizes with the device


@dataclass(frozen=True)
class Setup:
    """What a run trains with, from its first epoch to its last."""

    settings: RunSettings
    fabric: Fabric  # the launched processes
    data: Data  # on the device
    model: nn.Module  # the network, whose weights are saved
    parallel_model: nn.Module  # the same network, as Fabric runs it on the processes
    criterion: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    checkpointer: Checkpointer


def run(settings: RunSettings) -> tuple[Record, bool]:
    """Trains, validates and tests a run, unless it is already recorded.

    An interrupted run is resumed from its last checkpoint and gives the same result as one that never stopped.

    Returns:
        The run's record, and whether this call produced it.

    Raises:
        UsageError: for invalid input (before training starts), a loss that is not finite, or an unwritable folder.
        BusyError: if another process is working on this run.
    """
    if (record := load_valid_record(settings)) is not None:
        return record, False
    if is_main_process():
        check_logger(settings.logger)
    fabric = build_fabric(settings.trainer)
    if settings.trainer.precision in ("16-mixed", "16") and fabric.device.type == "cpu":
        raise UsageError(f"trainer.precision={settings.trainer.precision} needs a GPU; use bf16-mixed on a CPU")
    if settings.trainer.precision.startswith("bf16") and fabric.device.type == "cpu" and is_main_process():
        report_slow_bf16(settings.trainer.precision)
    environment = describe_environment(fabric.device)
    data = load_run_data(settings)
    batch_size = settings.trainer.batch_size
    if not fabric.world_size <= batch_size <= len(data.train):
        raise UsageError(
            f"trainer.batch_size={batch_size} must be at least the number of processes ({fabric.world_size}) "
            f"and at most the number of training images ({len(data.train)})"
        )
    seed_everything(settings.seed, verbose=False)
    model = synchronize_batch_norm(build_model(settings, data), fabric)
    # Only the main process writes, so only it takes the lock. Then it launches the other processes.
    with settings.directory.lock() if is_main_process() else nullcontext():
        # Another worker may have finished the run in the meantime.
        if (record := load_valid_record(settings)) is not None:
            return record, False
        if is_main_process() and settings.directory.record_file.exists():
            settings.directory.set_aside()
        fabric.launch()
        return train(settings, fabric, model, data.to(fabric.device), environment), True


def load_valid_record(settings: RunSettings) -> Record | None:
    """Loads the record of a finished run; None if there is none, or if ``fresh`` and something has changed since."""
    record = settings.directory.load_record()
    return None if record is not None and settings.fresh and find_changes(settings, record) else record


def train(settings: RunSettings, fabric: Fabric, model: nn.Module, data: Data, environment: dict[str, Any]) -> Record:
    """Trains a model from the start or from the last checkpoint, tests it, and writes the record.

    Args:
        settings: the run's settings.
        fabric: the launched processes of the run.
        model: the network with its initial weights, on the CPU.
        data: the data set, on the device.
        environment: the output of ``describe_environment``, for the record.
    """
    setup = prepare_training(settings, fabric, model, data)
    directory, checkpointer = settings.directory, setup.checkpointer
    inputs = describe_inputs(settings, data)
    losses = torch.zeros(len(data.train) // settings.trainer.batch_size, device=fabric.device)
    hits = torch.zeros((), dtype=torch.long, device=fabric.device)
    state = TrainState(losses=losses, hits=hits, inputs=inputs, sources=environment["sources"])
    if not checkpointer.restore(state):
        state.akps.append(snapshot_akps(model))
    if state.sources != environment["sources"]:
        state.sources = None
        environment = {**environment, "commit": None, "sources": None}
        if fabric.is_global_zero:
            print(f"{directory.path} was begun with other code, so its record will name none", file=sys.stderr)
    if fabric.is_global_zero:
        directory.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings.config)))
    with (
        open_logger(settings.logger, directory, settings.config, model) if fabric.is_global_zero else Logger() as logger
    ):
        logger.start(state.epoch)
        while state.epoch < settings.trainer.epochs:
            train_metrics = train_one_epoch(setup, state)
            logger.log(finish_epoch(setup, state, train_metrics))
            checkpointer.save(state)
        if fabric.is_global_zero:
            directory.verify(state.best_files)
            _write_history(directory, state)  # again, in case the files were damaged before the run was resumed
        fabric.barrier()
        record = make_record(setup, state, {**environment, **inputs})
        if fabric.is_global_zero:
            directory.write_record(record)
            directory.delete_checkpoints()
        logger.finish(record)
    return record


def prepare_training(settings: RunSettings, fabric: Fabric, model: nn.Module, data: Data) -> Setup:
    """Prepares what a run trains with; arguments as for ``train``."""
    trainer = settings.trainer
    if trainer.channels_last:
        model.to(memory_format=torch.channels_last)
    if trainer.compile:
        compile_if_possible(model, fabric.device)
    optimizer = build_optimizer(model, settings.optim)
    schedule = build_schedule(optimizer, settings.optim, len(data.train) // trainer.batch_size * trainer.epochs)
    parallel_model, optimizer = fabric.setup(model, optimizer)
    precision = fabric.strategy.precision
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "precision": precision}
    checkpointer = Checkpointer(fabric, settings.directory, trainer.checkpoint_minutes, **parts)
    criterion = build_criterion(settings.optim)
    return Setup(settings, fabric, data, model, parallel_model, criterion, optimizer, schedule, checkpointer)


def finish_epoch(setup: Setup, state: TrainState, train_metrics: dict[str, float]) -> dict[str, float]:
    """Validates a trained epoch, keeps its weights if they are the best, and returns its metrics."""
    data, directory = setup.data, setup.settings.directory
    val, predictions = predict(setup.parallel_model, data, data.val, setup.fabric)
    metrics = {"epoch": state.epoch + 1, "lr": state.lr, **train_metrics}
    metrics |= {"val_loss": val["loss"], "val_top1": val["top1"]}
    is_best = not state.best or _score(metrics) > _score(state.best)
    if is_best:
        state.best, state.best_correct = metrics, pack_correct(predictions, data.val)
    state.history.append(metrics)
    state.akps.append(snapshot_akps(setup.model))  # of the weights that are saved, which loading a run checks
    state.epoch, state.step = state.epoch + 1, 0
    if setup.fabric.is_global_zero:
        if is_best:
            weights = serialize_weights(setup.model, directory.identity, data)
            contents = {"model.safetensors": weights, "optimizer.pt": serialize(setup.optimizer.state_dict())}
            for name, content in contents.items():
                directory.write(name, content)
                state.best_files[name] = hashlib.sha256(content).hexdigest()
        _write_history(directory, state)
    return metrics


def make_record(setup: Setup, state: TrainState, origin: dict[str, Any]) -> Record:
    """Tests the network of the best epoch, and collects the record; ``origin`` describes environment and inputs."""
    data, directory = setup.data, setup.settings.directory
    weights_file = directory.path / "model.safetensors"
    test = test_correct = None
    if setup.settings.trainer.test:
        setup.model.load_state_dict(load_file(weights_file))
        test, predictions = predict(setup.parallel_model, data, data.test, setup.fabric)
        test_correct = pack_correct(predictions, data.test)
    num_conv_parameters, num_parameters = models.count_parameters(setup.model)
    values = {
        "format": RECORD_FORMAT,
        "id": directory.id,
        "config": directory.identity,
        "test": test,
        "val": {"top1": state.best["val_top1"], "loss": state.best["val_loss"]},
        "best_epoch": state.best["epoch"],
        "parameters": {"conv": num_conv_parameters, "total": num_parameters},
        "random_layers": find_random_layers(setup.model),
        "seconds": round(setup.checkpointer.elapsed, 2),
        **origin,
        "classes": data.classes,
        "weights": digest_file(weights_file),
        "correct": {"val": state.best_correct, "test": test_correct},
    }
    return construct(Record, values)


def pack_correct(predictions: torch.Tensor, split: Split) -> str:
    """Which images of a split were classified correctly: their bits (numpy.packbits, in order), in base64."""
    return base64.b64encode(np.packbits((predictions == split.labels.cpu()).numpy()).tobytes()).decode()


@functools.cache  # once per process
def report_slow_bf16(precision: str) -> None:
    """Says on stderr if this CPU has no instructions for bf16."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        slow = "this CPU has no instructions for bf16, so it can take 10 times as long as with 32-true"
        print(f"trainer.precision={precision}: {slow}", file=sys.stderr)


def compile_if_possible(model: nn.Module, device: torch.device) -> None:
    """Compiles the model in place, or reports why torch.compile does not work on this machine and leaves it eager."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except RuntimeError as error:
        if is_main_process():
            reason = str(error).splitlines()[0]
            print(f"torch.compile does not work here, so the network is not compiled: {reason}", file=sys.stderr)
    else:
        model.compile()


def train_one_epoch(setup: Setup, state: TrainState) -> dict[str, float]:
    """Trains one epoch, or the rest of an interrupted one. Each process computes its share of every batch.

    Returns:
        ``train_loss`` and ``train_top1`` (percent).

    Raises:
        UsageError: if the loss is not finite.
    """
    fabric, data, trainer = setup.fabric, setup.data, setup.settings.trainer
    rank, world_size, batch_size = fabric.global_rank, fabric.world_size, trainer.batch_size
    generator, steps = setup.checkpointer.generator, len(state.losses)
    setup.parallel_model.train()
    order = _start_epoch(setup, state)
    progress = tqdm(
        range(state.step, steps),
        desc=f"epoch {state.epoch + 1}/{trainer.epochs}",
        initial=state.step,
        total=steps,
        unit="image",
        unit_scale=batch_size,
        leave=False,
        disable=None if fabric.is_global_zero else True,
    )
    for step in progress:
        batch = data.train[order[step * batch_size : (step + 1) * batch_size]].to(fabric.device)
        images = data.augmentation(batch.images, generator)
        images, labels = images[rank::world_size], batch.labels[rank::world_size]
        logits = setup.parallel_model(data.normalize(images))
        # Weighted so that the mean over processes is the mean over the batch.
        loss = setup.criterion(logits, labels) * (len(labels) * world_size / batch_size)
        setup.optimizer.zero_grad()
        fabric.backward(loss)
        setup.optimizer.step()
        state.lr = float(setup.schedule.get_last_lr()[0])
        setup.schedule.step()
        state.losses[step] = loss.detach()
        state.hits += (logits.detach().argmax(1) == labels).sum()
        state.step = step + 1
        if state.step % CHECK_EVERY == 0 or state.step == steps:
            losses = all_reduce(fabric, state.losses[: state.step], "mean")
            _check_finite(losses, state, setup.checkpointer)
            top1 = 100 * int(state.hits) * world_size / (state.step * batch_size)
            progress.set_postfix(loss=f"{float(losses.mean()):.3f}", top1=f"{top1:.2f}%")
            if state.step < steps:
                setup.checkpointer.save_if_due(state)
    hits = int(all_reduce(fabric, state.hits, "sum"))
    return {"train_loss": float(losses.mean()), "train_top1": 100 * hits / (steps * batch_size)}


def _start_epoch(setup: Setup, state: TrainState) -> torch.Tensor:
    """Seeds or restores all random generators, and returns the order of the training images."""
    # The order, augmentation and dropout of an epoch depend only on the seed, the epoch and the process.
    generator, train = setup.checkpointer.generator, setup.data.train
    epoch_seed = setup.settings.seed * 100_003 + state.epoch
    generator.manual_seed(epoch_seed)
    order = torch.randperm(len(train), generator=generator).to(train.images.device)
    if state.step:
        assert state.generator is not None
        generator.set_state(state.generator)
    else:
        torch.manual_seed(epoch_seed * 1009 + setup.fabric.global_rank)
        state.losses.zero_()
        state.hits.zero_()
    return order


def _score(metrics: dict[str, float]) -> tuple[float, float]:
    """Ranks epochs by validation accuracy, then by lower validation loss."""
    return metrics["val_top1"], -metrics["val_loss"]


def _check_finite(losses: torch.Tensor, state: TrainState, checkpointer: Checkpointer) -> None:
    bad_steps = (~losses.isfinite()).nonzero()
    if len(bad_steps):
        step = int(bad_steps[0])
        note = f"the last good checkpoint is kept in {checkpointer.directory.path}; " if state.history else ""
        raise UsageError(
            f"the loss is {float(losses[step])} at step {state.epoch * len(state.losses) + step + 1} "
            f"(epoch {state.epoch + 1}); {note}try a lower optim.lr or optim.akp_lr_scale"
        )


def snapshot_akps(model: nn.Module) -> dict[str, torch.Tensor]:
    """Maps <layer>/<symbol>/<akp> to its values, (count,), in natural units (px, rad) on the CPU."""
    return {
        f"{name}/{symbol}/{akp}": values.detach().to("cpu", torch.float32, copy=True)
        for name, layer in analytic_layers(model).items()
        for symbol, akps in layer.akps().items()
        for akp, values in akps.items()
    }


def _write_history(directory: RunDirectory, state: TrainState) -> None:
    """Writes the metrics and AKPs of all completed epochs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, state.history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(state.history)
    directory.write("metrics.csv", text.getvalue())
    if state.akps[0]:
        akp_history = {name: torch.stack([akps[name] for akps in state.akps]) for name in state.akps[0]}
        directory.write("akps.safetensors", save(akp_history))
