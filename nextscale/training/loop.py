"""The training loop: one function, the same under `python`, `accelerate launch` and `torchrun`."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from nextscale.errors import UserError
from nextscale.streams import stream
from nextscale.training import checkpoint, record
from nextscale.training.batches import LoadBatch, batches, global_batch_size, micro_batch
from nextscale.training.config import TrainingConfig
from nextscale.training.schedules import lr_factor, weight_decay_at
from nextscale.training.session import (
    Losses,
    Modules,
    Session,
    Stateful,
    Sums,
    open_accelerator,
    prepare,
    release,
    start,
)
from nextscale.training.wrapping import bare

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    steps: int
    """Optimizer steps of the whole run, earlier sessions included."""
    seconds: float
    """Training time of the whole run, earlier sessions included."""
    metrics: dict[str, float]
    """The last log line and the last validation."""
    modules: Modules
    """The trained modules, unwrapped."""
    ema_modules: Modules
    """Their averages, by the same names; empty without EMA."""
    checkpoint: Path | None
    """The checkpoint of the last step."""


def fit(
    config: TrainingConfig,
    *,
    modules: Modules,
    optimizers: dict[str, Optimizer],
    load_batch: LoadBatch,
    dataset_size: int,
    losses: Losses,
    ema: Collection[str] | None = None,
    validate: Callable[[Modules, int], Mapping[str, float]] | None = None,
    after_step: Callable[[Modules, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    state: Stateful | None = None,
    find_unused_parameters: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train until `max_train_steps` or `max_train_minutes`, leaving checkpoints and a record.

    Args:
        config: The run.
        modules: By name. Those without trainable parameters are moved to the device, put in eval
            mode and not saved.
        optimizers: By name, over disjoint parameters of the modules. Learning rate and weight
            decay are set by the loop; a parameter group may carry `"lr_scale"`, and
            `"decay": False` for no weight decay.
        load_batch: (dataset indices, step) -> batch on the CPU. Its noise, if any, must come from
            streams of (seed, step, index), not from torch's global state.
        dataset_size: Number of examples; indices are below it.
        losses: (prepared modules, batch on the device, step from 0) -> one (optimizer name, loss,
            metrics) for each optimizer. A loss changes the gradients of its own optimizer's
            parameters only; all optimizers step after the last one. Metrics are means over the
            micro-batch. Call the modules themselves, or `bare` and `frozen` of them.
        ema: Modules to average if `use_ema`; None: all trained ones.
        validate: (unwrapped modules in eval mode, averaged where there is an average; step) ->
            metrics; on every process, without gradients. The main process's values are logged.
        after_step: (unwrapped modules, steps done), after each optimizer step and EMA update.
        stop: Asked after each validation; True ends the run there, alike on every process.
        state: What else a resumed run needs, kept in the checkpoint as JSON.
        find_unused_parameters: Some steps leave trainable parameters out of the loss; without this
            DDP would wait for their gradients.
        progress: Show a bar if stderr is a terminal.

    Raises:
        UserError: For settings that do not fit together, and, with exit code 1, when a loss or
            gradient is not finite; the message names step, indices and last good checkpoint.
    """
    # Before anything is moved or written: would this call mix two runs?
    resume = checkpoint.find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    shared = torch.distributed.is_initialized()  # the caller's group, who has more to do in it
    accelerator = open_accelerator(config, len(optimizers), find_unused_parameters)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            run = prepare(config, accelerator, modules, optimizers, losses, ema, dataset_size)
            run.state = state
            start(run, resume)
            _train(run, load_batch, validate, after_step, stop, progress)
        if shared:
            for tracker in accelerator.trackers:
                tracker.finish()
        else:
            accelerator.end_training()
    finally:
        release(accelerator, modules)
    averages = {name: average.module for name, average in run.averages.items()}
    release(accelerator, averages)
    return FitResult(run.step, run.seconds, run.metrics, modules, averages, run.last_checkpoint)


def _train(
    run: Session,
    load_batch: LoadBatch,
    validate: Callable[[Modules, int], Mapping[str, float]] | None,
    after_step: Callable[[Modules, int], None] | None,
    stop: Callable[[], bool] | None,
    progress: bool,
) -> None:
    config, accelerator = run.config, run.accelerator
    data = batches(
        config,
        load_batch,
        run.dataset_size,
        run.step,
        accelerator.process_index,
        accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    bar = tqdm(
        total=config.max_train_steps,
        initial=run.step,
        unit="step",
        disable=not (progress and accelerator.is_main_process and sys.stderr.isatty()),
    )
    begun = time.monotonic()
    window_seconds, window_steps = 0.0, 0
    with bar:
        if validate is not None and stop is not None and _left_open(run):
            # The checkpoint is older than this validation, which decides whether the run goes on.
            if accelerator.is_main_process:
                record.rewind_log(Path(config.output_dir, "log.jsonl"), run.step, validated=False)
            _validate(run, validate)
            if stop():
                logger.info("stopped by the run's own monitor at step %d", run.step)
                return
        while run.step < config.max_train_steps:
            clock = time.monotonic()
            out_of_time = (
                config.max_train_minutes is not None
                and clock - begun >= config.max_train_minutes * 60
            )
            out_of_time = _step(run, data, out_of_time)
            if after_step is not None:
                after_step(_unwrapped(run), run.step)
            spent = time.monotonic() - clock
            run.seconds, window_seconds = run.seconds + spent, window_seconds + spent
            window_steps += 1
            bar.update()
            last = out_of_time or run.step == config.max_train_steps
            if last or run.step % config.logging_steps == 0:
                images = window_steps * global_batch_size(config, accelerator.num_processes)
                _log(run, images / window_seconds, bar)
                window_seconds, window_steps = 0.0, 0
            # Checkpoint first: a validation that fails must not cost the steps before it.
            if last or _due(run.step, config.checkpointing_steps):
                _save(run)
            if validate is not None and (last or _due(run.step, config.validation_steps)):
                _validate(run, validate)
                if stop is not None and stop():
                    if run.last_checkpoint != _folder(run):
                        _save(run)
                    logger.info("stopped by the run's own monitor at step %d", run.step)
                    break
            if out_of_time:
                logger.info("stopped after max_train_minutes at step %d", run.step)
                break


def _left_open(run: Session) -> bool:
    """Whether a resumed run begins at a step whose validation belongs to it."""
    inside = 0 < run.step < run.config.max_train_steps
    return inside and _due(run.step, run.config.validation_steps)


def _step(run: Session, data: Iterator[Any], out_of_time: bool) -> bool:
    """Take one optimizer step; returns whether any process is out of time."""
    from accelerate.utils import send_to_device

    config, accelerator = run.config, run.accelerator
    parameters = {
        name: [p for g in o.param_groups for p in g["params"] if p.requires_grad]
        for name, o in run.optimizers.items()
    }
    several = len(parameters) > 1
    bad: list[int] = []
    used: dict[str, None] = {}
    for micro in range(config.gradient_accumulation_steps):
        batch = send_to_device(next(data), accelerator.device, non_blocking=True)
        key = (config.seed, run.step, micro, accelerator.process_index)
        torch.manual_seed(stream(*key).initial_seed())
        with accelerator.accumulate(*run.trained.values()):
            for name, loss, metrics in run.losses(run.prepared, batch, run.step):
                used[name] = None
                # A generator's loss must not leave gradients in the discriminator.
                only = {"inputs": parameters[name]} if several else {}
                accelerator.backward(loss, **only)
                value = float(loss.detach())
                _add(run.sums, {_key("loss", name, several): value, **metrics})
                if not math.isfinite(value):
                    bad.append(micro)
    flags: Any = torch.tensor([float(bool(bad)), float(out_of_time)], device=accelerator.device)
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum")
    any_bad, any_out_of_time = (flag > 0 for flag in flags.tolist())
    if any_bad:
        _stop_not_finite(run, bad, "loss")
    for name in used:
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = accelerator.clip_grad_norm_(parameters[name], limit)
        if norm is None:  # DeepSpeed clips inside its own step
            continue
        # Under fp16 an overflow is normal: the scaler skips the step and halves its factor.
        if not math.isfinite(float(norm)) and accelerator.scaler is None:
            _stop_not_finite(run, list(range(config.gradient_accumulation_steps)), "gradient")
        _add(run.sums, {_key("grad_norm", name, several): float(norm)})
    for name in used:
        optimizer = run.optimizers[name]
        _set_hyperparameters(config, optimizer, run.step)
        optimizer.step()
        optimizer.zero_grad()
    for name, average in run.averages.items():
        average.update_parameters(bare(run.prepared[name]))
    run.step += 1
    return any_out_of_time


def _set_hyperparameters(config: TrainingConfig, optimizer: Optimizer, step: int) -> None:
    rate = config.learning_rate * lr_factor(config, step)
    decay = weight_decay_at(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
        if "weight_decay" in group:
            group["weight_decay"] = decay if group.get("decay", True) else 0.0


def _stop_not_finite(run: Session, micros: list[int], what: str) -> None:
    from accelerate.utils import gather_object

    accelerator = run.accelerator
    place = (accelerator.process_index, accelerator.num_processes)
    own = [micro_batch(run.config, run.dataset_size, run.step, m, *place) for m in set(micros)]
    indices = gather_object([int(i) for part in own for i in part])
    shown = ", ".join(map(str, indices[:32])) + (", ..." if len(indices) > 32 else "")
    raise UserError(
        f"The {what} of step {run.step + 1} is not finite. The batch held the {len(indices)} "
        f"dataset indices {shown}. Last good checkpoint: {run.last_checkpoint or 'none'}. Look "
        "at these images, or resume with a lower learning_rate or mixed_precision=no.",
        exit_code=1,
    )


def _log(run: Session, images_per_second: float, bar: tqdm) -> None:
    config, accelerator = run.config, run.accelerator
    means = {name: total / count for name, (total, count) in _all_sums(run).items()}
    run.sums = {}
    values = {
        "images": run.step * global_batch_size(config, accelerator.num_processes),
        "lr": config.learning_rate * lr_factor(config, run.step - 1),
        **means,
        "images_per_second": images_per_second,
        "seconds": run.seconds,
    }
    run.metrics |= values
    losses = {k: f"{v:.4g}" for k, v in means.items() if k.startswith("loss")}
    bar.set_postfix(losses)
    if bar.disable and accelerator.is_main_process:  # a log file instead of a terminal
        shown = [*(f"{k} {v}" for k, v in losses.items()), f"{images_per_second:.3g} images/s"]
        logger.info("step %d of %d: %s", run.step, config.max_train_steps, ", ".join(shown))
    _write(run, values)


def _validate(run: Session, validate: Callable[[Modules, int], Mapping[str, float]]) -> None:
    views = _unwrapped(run) | {name: a.module for name, a in run.averages.items()}
    training = {name: module.training for name, module in views.items()}
    torch.manual_seed(stream(run.config.seed, run.step).initial_seed())
    for module in views.values():
        module.eval()
    with torch.no_grad():
        values = {f"val/{k}": float(v) for k, v in validate(views, run.step).items()}
    for name, module in views.items():
        module.train(training[name])
    run.metrics |= values
    _write(run, values)
    run.accelerator.wait_for_everyone()


def _write(run: Session, values: Mapping[str, float]) -> None:
    if run.accelerator.is_main_process:
        path = Path(run.config.output_dir, "log.jsonl")
        record.append_line(path, {"step": run.step, **values})
    run.accelerator.log(dict(values), step=run.step)


def _save(run: Session) -> None:
    config, accelerator = run.config, run.accelerator
    folder = _folder(run)
    scaler = accelerator.scaler
    state = {
        "step": run.step,
        "seconds": run.seconds,
        "seed": config.seed,
        "dataset_size": run.dataset_size,
        "global_batch_size": global_batch_size(config, accelerator.num_processes),
        "sums": _all_sums(run),
        "scaler": None if scaler is None else scaler.state_dict(),
        "own": None if run.state is None else run.state.state_dict(),
    }
    plain = {n: getattr(o, "optimizer", o) for n, o in run.optimizers.items()}
    main = accelerator.is_main_process
    checkpoint.save_checkpoint(folder, run.trained, plain, run.averages, state, main=main)
    if main:
        checkpoint.delete_old_checkpoints(config.output_dir, config.checkpoints_total_limit)
    run.last_checkpoint = folder
    accelerator.wait_for_everyone()


def _folder(run: Session) -> Path:
    return Path(run.config.output_dir, "checkpoints", f"step_{run.step:08d}")


def _all_sums(run: Session) -> Sums:
    """The metric sums since the last log line over all processes."""
    from accelerate.utils import gather_object

    merged: Sums = {}
    for sums in gather_object([run.sums]):
        for name, (total, count) in sums.items():
            have = merged.get(name, [0.0, 0.0])
            merged[name] = [have[0] + total, have[1] + count]
    return merged


def _add(sums: Sums, values: Mapping[str, float | Tensor]) -> None:
    for name, value in values.items():
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        total, count = sums.get(name, [0.0, 0.0])
        sums[name] = [total + number, count + 1]


def _key(what: str, name: str, several: bool) -> str:
    return f"{what}/{name}" if several else what


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _unwrapped(run: Session) -> Modules:
    return {name: bare(module) for name, module in run.prepared.items()}
