"""What a GRPO step costs, and what cache re-use and one-pass evaluation save; ratios in one run.

    python benchmarks/alignment.py

Bundled model, guidance 3, bf16 where the machine has it. Branching: 4 siblings for each of 32
samples from every scale on, by repeating the prefix's cache, against drawing all 128 from scratch.
Evaluation: log-probabilities of 64 samples by one teacher-forced pass, against a cached pass scale
by scale with the tokens forced. Steps: rollout, reward and update of 64 samples, each setting in a
process of its own for its peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import save_record

from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.data.benchmark import load_benchmark
from nextscale.pipeline import NextScalePipeline, resolve_dtype
from nextscale.processes import keep_freed_memory
from nextscale.streams import stream
from nextscale.training import adamw
from nextscale.var import SamplingConfig, sample
from nextscale.var.sampling import Forcing

PARENTS, SIBLINGS, SAMPLES = 32, 4, 64
SETTINGS = SamplingConfig(guidance_scale=3.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, gradient checkpointing": {"checkpointing": True},
    "LoRA rank 8": {"rank": 8},
    "LoRA rank 8, gradient checkpointing": {"rank": 8, "checkpointing": True},
}


def open_policy(batch_size: int) -> tuple[NextScalePolicy, torch.dtype | None]:
    pipe = NextScalePipeline.from_pretrained("scenes", dtype="float32")
    half = resolve_dtype("auto", pipe.device)
    autocast = None if half == torch.float32 else half
    return NextScalePolicy(pipe, SETTINGS, autocast=autocast, batch_size=batch_size), autocast


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The best of some runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def generators(count: int) -> list[torch.Generator]:
    return [stream(0, i) for i in range(count)]


def branching() -> list[dict[str, Any]]:
    policy, _ = open_policy(PARENTS * SIBLINGS)
    ids = policy.encode(load_benchmark("hard")[:PARENTS])
    parents = policy.sample(ids, generators=generators(PARENTS))
    many = ids.repeat_interleave(SIBLINGS, 0)
    count = PARENTS * SIBLINGS
    rows = []
    for scale in range(1, policy.num_steps):
        scratch = seconds(lambda: policy.sample(many, generators=generators(count)))
        branch = seconds(
            lambda scale=scale: policy.branch(
                parents, scale, SIBLINGS, generators=generators(count)
            )
        )
        rows.append({"scale": scale, "branch_s": round(branch, 3), "scratch_s": round(scratch, 3),
                     "ratio": round(scratch / branch, 2)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def evaluation() -> dict[str, Any]:
    policy, autocast = open_policy(SAMPLES)
    ids = policy.encode(load_benchmark("hard")[:SAMPLES])
    trajectory = policy.sample(ids, generators=generators(SAMPLES))
    tokens = torch.cat(trajectory.actions, dim=1)
    forcing = Forcing(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def half() -> Any:
        if autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(policy.model.device.type, autocast)

    def one_pass() -> None:
        with torch.no_grad(), half():
            policy.evaluate(trajectory)

    def scale_by_scale() -> None:
        with torch.no_grad(), half():
            condition = policy.model.condition(ids)
            steps = sample(policy.model, policy.tokenizer, condition, SETTINGS,
                           seeds=list(range(SAMPLES)), forcing=forcing)  # fmt: skip
            for step in steps:
                step.logits.log_softmax(-1).gather(2, step.tokens[..., None])

    whole, stepped = seconds(one_pass), seconds(scale_by_scale)
    row = {"one_pass_s": round(whole, 3), "scale_by_scale_s": round(stepped, 3),
           "ratio": round(stepped / whole, 2)}  # fmt: skip
    print(row, flush=True)
    return row


def grpo_step(variant: str) -> dict[str, Any]:
    """Rollout, reward and one update of 64 samples in micro-batches of 32, in this process."""
    from nextscale.align.experience import collect
    from nextscale.align.methods.grpo import GRPO, GRPOConfig
    from nextscale.align.prompts import Prompt
    from nextscale.align.rewards import open_reward
    from nextscale.training import TrainingConfig
    from nextscale.var.lora import add_lora

    keep_freed_memory()
    chosen = VARIANTS[variant]
    policy, autocast = open_policy(SAMPLES)
    model = policy.model
    model.gradient_checkpointing = chosen.get("checkpointing", False)
    if "rank" in chosen:
        add_lora(model, rank=chosen["rank"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": trained}], TrainingConfig(output_dir=""))
    method = GRPO(GRPOConfig(), policy)
    reward = [open_reward("checker_statements")]
    prompts = [Prompt(caption, {}) for caption in load_benchmark("hard")[:8]]
    spent = {"rollout": 0.0, "update": 0.0}
    for step in range(4):
        began = time.perf_counter()
        experience = method.learn(collect(policy, reward, prompts, 8, (0, step)))
        drawn = time.perf_counter()
        for examples in torch.arange(SAMPLES).split(32):
            for loss, _ in _losses(method, experience, examples, step, policy, autocast):
                (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first one warms up
            spent["rollout"] += drawn - began
            spent["update"] += time.perf_counter() - drawn
    total = sum(spent.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "samples_per_second": round(3 * SAMPLES / total, 2),
        "rollout_share": round(spent["rollout"] / total, 2),
        "peak_mb": round(peak),
        "trained_parameters": sum(p.numel() for p in trained),
    }


def _losses(method, experience, examples, step, policy, autocast):
    context = contextlib.nullcontext()
    if autocast is not None:
        context = torch.autocast(policy.model.device.type, autocast)
    with context:
        yield from method.losses(experience, examples, step, policy.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", help="only this setting of a step, as JSON")
    parser.add_argument("--output", default="benchmarks/results/alignment.json")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(grpo_step(arguments.variant)))
        return
    keep_freed_memory()
    steps = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        steps[variant] = json.loads(done.stdout.splitlines()[-1])
        print(variant, steps[variant], flush=True)
    first = steps["full"]
    for row in steps.values():
        row["ratio_of_speed"] = round(row["samples_per_second"] / first["samples_per_second"], 2)
        row["ratio_of_memory"] = round(row["peak_mb"] / first["peak_mb"], 2)
    save_record(
        arguments.output,
        "python benchmarks/alignment.py",
        "peft",
        branching=branching(),
        evaluation=evaluation(),
        steps=steps,
    )


if __name__ == "__main__":
    main()
