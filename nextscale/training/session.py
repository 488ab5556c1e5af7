"""Opening and closing a training session: device, wrapping, averages, resume, record."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nextscale.errors import UserError, missing_extra
from nextscale.processes import cpu_prefers_bfloat16
from nextscale.training import checkpoint, record
from nextscale.training.batches import global_batch_size
from nextscale.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Modules = dict[str, nn.Module]
Losses = Callable[[Modules, Any, int], Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]]
Sums = dict[str, list[float]]  # metric -> [sum, count]


@runtime_checkable
class Stateful(Protocol):
    """Something whose state belongs into a checkpoint, as JSON."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


@dataclass
class Session:
    """What the parts of the loop share, and where the run stands."""

    config: TrainingConfig
    accelerator: Accelerator
    prepared: Modules
    trained: nn.ModuleDict
    optimizers: dict[str, Optimizer]
    averages: dict[str, AveragedModel]
    losses: Losses
    dataset_size: int
    step: int = 0
    seconds: float = 0.0
    sums: Sums = field(default_factory=dict)
    last_checkpoint: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    state: Stateful | None = None


def resolve_precision(mixed_precision: str) -> str:
    """Turn `auto` into bf16 where the device multiplies in it, else no."""
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if cpu_prefers_bfloat16() else "no"


def open_accelerator(
    config: TrainingConfig, optimizer_count: int, find_unused_parameters: bool
) -> Accelerator:
    """Check what the run needs against this machine, and join the other processes.

    Raises:
        UserError: If accelerate, the precision or the tracker is not available.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, GradScalerKwargs
        from accelerate.utils import ProjectConfiguration
    except ImportError as error:
        raise missing_extra("training needs accelerate", "train") from error

    if config.mixed_precision == "fp16" and (optimizer_count > 1 or not torch.cuda.is_available()):
        # accelerate updates its one loss scaler at each optimizer's step.
        raise UserError("mixed_precision fp16 needs CUDA and a single optimizer. Use bf16 or no.")
    compilers = (os.environ.get("CXX") or "g++", "g++", "clang++")
    if config.compile and not torch.cuda.is_available() and not any(map(shutil.which, compilers)):
        raise UserError(
            "compile needs a C++ compiler on the CPU, and there is no g++ here. Install one, or "
            "leave compile off."
        )
    tracker = None if config.report_to == "none" else config.report_to
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(
            f"report_to {tracker} needs the package {tracker}. Install it with: pip install "
            f"{tracker}, or use report_to=none (log.jsonl is written in any case)."
        )
    return Accelerator(
        mixed_precision=resolve_precision(config.mixed_precision),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=tracker,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=config.output_dir),
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[
            # VAR's loss scaler; without effect unless fp16.
            GradScalerKwargs(init_scale=2.0**11, growth_interval=1000),
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
        ],
    )


def prepare(
    config: TrainingConfig,
    accelerator: Accelerator,
    modules: Modules,
    optimizers: dict[str, Optimizer],
    losses: Losses,
    ema: Collection[str] | None,
    dataset_size: int,
) -> Session:
    """Wrap modules and optimizers for the machine, and make the averages."""
    trained = [n for n, m in modules.items() if any(p.requires_grad for p in m.parameters())]
    averages: dict[str, AveragedModel] = {}
    if config.use_ema:
        if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise UserError(
                f"use_ema is not available under {accelerator.distributed_type.value}, which "
                "splits the weights. Set use_ema to false, or use plain data parallelism."
            )
        average_of = get_ema_multi_avg_fn(config.ema_decay)
        for name in trained if ema is None else ema:
            # Copied before accelerate and torch.compile attach anything to the module.
            average = AveragedModel(modules[name], multi_avg_fn=average_of)
            averages[name] = average.to(accelerator.device).requires_grad_(False).eval()
            accelerator.prepare_model(average.module, evaluation_mode=True)
    for name, module in modules.items():
        if config.compile:
            module.compile()
        if name not in trained:
            accelerator.prepare_model(module.eval(), evaluation_mode=True)
        else:
            module.train()
    wrapped = accelerator.prepare(*(modules[n] for n in trained), *optimizers.values())
    wrapped = wrapped if isinstance(wrapped, tuple) else (wrapped,)
    by_name = dict(zip(trained, wrapped, strict=False))
    steppers = dict(zip(optimizers, wrapped[len(trained) :], strict=True))
    prepared = {name: by_name.get(name, module) for name, module in modules.items()}
    return Session(
        config,
        accelerator,
        prepared,
        nn.ModuleDict(by_name),
        steppers,
        averages,
        losses,
        dataset_size,
    )


def start(run: Session, resume: Path | None) -> None:
    """Resume or begin, and open the record."""
    config, accelerator = run.config, run.accelerator
    geometry = {
        "seed": config.seed,
        "dataset_size": run.dataset_size,
        "global_batch_size": global_batch_size(config, accelerator.num_processes),
    }
    if resume is not None:
        plain = {n: getattr(o, "optimizer", o) for n, o in run.optimizers.items()}
        state = checkpoint.load_checkpoint(resume, run.trained, plain, run.averages)
        run.step, run.seconds = state["step"], state["seconds"]
        # They are sums over all processes, so only one may carry them on.
        run.sums = state["sums"] if accelerator.is_main_process else {}
        run.last_checkpoint = resume
        if run.state is not None and state.get("own") is not None:
            run.state.load_state_dict(state["own"])
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        for name, value in geometry.items():
            if state[name] != value:
                logger.warning("%s was %s, is %s: other data order", name, state[name], value)
        logger.info("resumed from %s at step %d", resume, run.step)
    elif config.resume_from_checkpoint:
        logger.info("no checkpoint in %s yet: starting from scratch", config.output_dir)
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        record.rewind_log(Path(config.output_dir, "log.jsonl"), run.step)
        facts = {
            **geometry,
            "device": str(accelerator.device),
            "device_name": _device_name(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "resumed_from_step": run.step if resume else None,
        }
        record.write_record(config, facts)
    values = dataclasses.asdict(config).items()
    flat = {k: v for k, v in values if isinstance(v, (bool, int, float, str))}
    # A resumed tensorboard drops what the killed run drew past its checkpoint.
    accelerator.init_trackers(
        "tensorboard" if config.report_to == "tensorboard" else "nextscale",
        config=flat,
        init_kwargs={"tensorboard": {"purge_step": run.step + 1}},
    )


def _device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def release(accelerator: Accelerator, modules: Modules) -> None:
    """Give the modules back as they came, and let a later `fit` choose its own precision."""
    from accelerate.state import AcceleratorState

    for module in modules.values():
        accelerator.unwrap_model(module, keep_fp32_wrapper=False, keep_torch_compile=False)
        module.__dict__.pop("_is_accelerate_prepared", None)
    with contextlib.suppress(AttributeError):
        AcceleratorState._reset_state(reset_partial_state=False)
