"""What control costs a call: time, memory and multiplications beside the uncontrolled model.

    python benchmarks/control_overhead.py

VAR-d16 shapes, 256 px, B = 4, guidance on, random weights, decoder excluded. The variants take
turns, call by call, so that a change of the machine's load meets all of them; the ratio is that of
the medians. The encoder runs once per picture and is listed apart. Also trains one step of each
module with the base frozen, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from record import save_record
from sampling import build
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nextscale.control import (
    AdapterConfig,
    AdditiveConfig,
    Control,
    ControlHooks,
    ControlModule,
    ControlRecord,
    SideNetworkConfig,
    attach,
    build_control,
)
from nextscale.control.train import ControlledTransformer
from nextscale.processes import keep_freed_memory
from nextscale.var import SamplingConfig, sample

MODULES = {
    "additive, 3 sites": AdditiveConfig(),
    "adapter, depth / 4": AdapterConfig(),
    "side network, depth / 2": SideNetworkConfig(),
}


class Multiplications(TorchFunctionMode):
    """Counts those of linear layers and convolutions, as methods of the literature do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.count += out.numel() * args[1].shape[1]
        elif func in (F.conv2d, torch.conv2d):
            self.count += out.numel() * args[1][0].numel()
        elif func is F.multi_head_attention_forward:  # its four projections, inside one call
            self.count += 4 * args[0].numel() * args[0].shape[-1]
        elif func is torch._transformer_encoder_layer_fwd:  # a layer in one kernel
            self.count += args[0].shape[:2].numel() * sum(
                w.numel() for w in args[1:] if isinstance(w, Tensor) and w.ndim == 2
            )
        return out


def sampled(
    model: Any, tokenizer: Any, module: ControlModule | None, maps: Tensor, batch: int
) -> tuple[float, float, int]:
    """Seconds of a call without the encoder, seconds of the encoder, multiplications of both."""
    hooks, encoder = None, 0.0
    settings = SamplingConfig(guidance_scale=5.0, top_k=900, top_p=0.95)
    with torch.no_grad(), Multiplications() as counter:
        if module is not None:
            start = time.perf_counter()
            part = attach(module, maps, Control(image=None, type="canny"))
            encoder = time.perf_counter() - start
        start = time.perf_counter()
        if module is not None:
            hooks = ControlHooks(model, [part], cached=True)
        condition = model.condition(torch.arange(batch))
        for _ in sample(
            model, tokenizer, condition, settings, seeds=list(range(batch)), hooks=hooks
        ):
            pass
        return time.perf_counter() - start, encoder, counter.count


def train_step(model: Any, module: ControlModule, maps: Tensor, dtype: torch.dtype) -> float:
    """Loss of one step with the base frozen; raises if a gradient is missing or not finite."""
    both = ControlledTransformer(model.requires_grad_(False), module)
    tokens = torch.randint(model.config.codebook_size, (len(maps), model.schedule.num_tokens))
    inputs = torch.randn(len(maps), model.schedule.num_tokens - 1, model.config.codebook_dim)
    ids, keep = torch.arange(len(maps)), torch.ones(len(maps), dtype=torch.bool)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    for _ in range(2):  # behind a zero output layer, gradients come with the second step
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = both(inputs, ids, maps, keep, model.schedule.num_scales)
        loss = F.cross_entropy(logits.transpose(1, 2).float(), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            raise SystemExit(f"{name} has no finite gradient")
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/control_overhead.json")
    options = parser.parse_args()
    keep_freed_memory()
    model, tokenizer = build(options.depth, torch.float32, "cpu")
    record = ControlRecord(type="canny", resolution=(256, 256), base_fingerprint="")
    torch.manual_seed(0)
    modules: dict[str, ControlModule | None] = {"none": None}
    modules |= {n: build_control(c, model.config, record) for n, c in MODULES.items()}
    maps = (torch.rand(options.batch, 3, 256, 256) > 0.9).float()
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in modules}
    for repeat in range(options.repeats + 1):
        for name, module in modules.items():
            found = sampled(model, tokenizer, module, maps, options.batch)
            print(repeat, name, found, flush=True)
            if repeat:  # the first call warms up
                times[name].append(found)
    base = statistics.median(seconds for seconds, _, _ in times["none"])
    rows = {}
    for name, module in modules.items():
        seconds = statistics.median(seconds for seconds, _, _ in times[name])
        rows[name] = {
            "seconds": round(seconds, 3),
            "extra_time": round(seconds / base - 1, 4),
            "encoder_seconds": round(statistics.median(e for _, e, _ in times[name]), 3),
        }
        if module is not None:
            encoder = sum(p.numel() for p in module.encoder.parameters())
            every = sum(p.numel() for p in module.parameters())
            more = times[name][0][2] / times["none"][0][2] - 1
            rows[name] |= {
                "parameters_without_encoder": every - encoder,
                "encoder_parameters": encoder,
                "extra_multiplications_with_encoder": round(more, 4),
                "loss_after_a_step_float32": train_step(model, module, maps[:1], torch.float32),
                "loss_after_a_step_bfloat16": train_step(model, module, maps[:1], torch.bfloat16),
            }
        print(name, json.dumps(rows[name]), flush=True)
        command = "python benchmarks/control_overhead.py"
        save_record(options.output, command, depth=options.depth, batch=options.batch, rows=rows)


if __name__ == "__main__":
    main()
