"""Images per second of the tokenizer, encoding and decoding, beside its bare convolutions.

python benchmarks/tokenizer.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

import torch
from record import save_record
from sampling import Recorder, seconds

from nextscale.processes import keep_freed_memory
from nextscale.storage import resolve_model
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.tokenizers.train import initialize


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/tokenizer.json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_freed_memory()  # as the command line does
    released = MultiscaleVQ(TokenizerConfig())
    initialize(released)
    bundled = MultiscaleVQ.from_pretrained(resolve_model("scenes") / "tokenizer")
    rows = []
    for name, tokenizer, batch in (
        ("released size, 256 px", released, 4),
        ("scenes, 64 px", bundled, 64),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            tokenizer.eval().to(device).to_dtype(dtype)
            pixels = torch.rand(batch, 3, *tokenizer.resolution, device=device) * 2 - 1
            tokens = tokenizer.encode(pixels)
            for job, call in (
                ("encode", lambda t=tokenizer, p=pixels: t.encode(p)),
                ("decode", lambda t=tokenizer, c=tokens: t.decode(c)),
            ):
                with Recorder() as recorder:
                    call()
                ours = seconds(call, options.repeats, device)
                bound = seconds(recorder.replay, options.repeats, device)
                row = {
                    "tokenizer": name, "dtype": str(dtype)[6:], "job": job, "batch": batch,
                    "images_per_second": round(batch / ours, 2),
                    "bound": round(batch / bound, 2), "ratio": round(ours / bound, 3),
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
    command = shlex.join(["python", *sys.argv])
    save_record(options.output, command, device=device, rows=rows)


if __name__ == "__main__":
    main()
