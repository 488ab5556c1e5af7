from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from nextscale.pipeline import NextScalePipeline

PROMPT = "a red circle left of a blue square"


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_writes_pictures_grid_and_recipe(generate, tmp_path):
    result = generate(PROMPT, "a green cross", "--num_images", 2, "--seed", 7, "--json")
    assert result.code == 0, result.err
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {*(f"{i:06d}.png" for i in range(4)), "grid.png", "recipe.yaml"}
    assert result.json["num_images"] == 4
    assert result.json["seed"] == 7
    assert result.json["images"] == [str(out / f"{i:06d}.png") for i in range(4)]
    assert pixels(out / "000000.png").shape == (32, 32, 3)
    with Image.open(out / "grid.png") as grid:
        about = json.loads(grid.text["nextscale"])
    assert about["seed"] == 7
    assert about["weights"] == result.json["weights"]


def test_matches_the_pipeline(generate, models, tmp_path):
    assert generate(PROMPT, "--num_images", 2, "--seed", 3).code == 0
    pipe = NextScalePipeline.from_pretrained(models["words"], device="cpu", dtype="float32")
    expected = pipe(PROMPT, num_images_per_prompt=2, seed=3).images
    for index, image in enumerate(expected):
        assert (pixels(tmp_path / f"out/{index:06d}.png") == np.asarray(image)).all()


def test_png_says_how_it_was_made(generate, models, tmp_path):
    generate(PROMPT, "--num_images", 2, "--seed", 3, "--top_p", 0.9)
    with Image.open(tmp_path / "out/000001.png") as image:
        about = json.loads(image.text["nextscale"])
    assert about["prompt"] == PROMPT
    assert (about["seed"], about["top_p"], about["top_k"]) == (4, 0.9, 8)
    assert about["guidance_scale"] == 2.0
    assert about["model"] == models["words"]
    assert len(about["weights"]) == 64
    assert about["versions"]["nextscale"]


def test_recipe_repeats_the_run_bit_for_bit(generate, run, tmp_path):
    generate(PROMPT, "--num_images", 3, "--top_p", 0.9, "--more_smooth")
    again = run(
        "generate", "--config", tmp_path / "out/recipe.yaml", "--output_dir", tmp_path / "b"
    )
    assert again.code == 0, again.err
    assert pictures(tmp_path / "out") == pictures(tmp_path / "b")
    first, second = (
        yaml.safe_load((tmp_path / d / "recipe.yaml").read_text()) for d in ("out", "b")
    )
    assert first.pop("output_dir") != second.pop("output_dir")
    assert first == second
    assert first["command"] == "generate"
    assert first["more_smooth"] is True


def test_resume_repeats_bit_for_bit(generate, tmp_path):
    words = [PROMPT, "--num_images", 5, "--seed", 0, "--save_scales"]
    generate(*words)
    whole = pictures(tmp_path / "out")
    for name in ("000001.png", "000004.png"):
        (tmp_path / "out" / name).unlink()
    kept = (tmp_path / "out/000002.png").stat().st_mtime_ns
    assert generate(*words, "--resume", "--npz").code == 0
    assert pictures(tmp_path / "out") == whole
    assert (tmp_path / "out/000002.png").stat().st_mtime_ns == kept
    assert (tmp_path / "out/samples.npz").exists()


def test_resume_takes_the_stored_seed_and_refuses_other_settings(generate, tmp_path):
    generate(PROMPT, "--num_images", 2)
    before = pictures(tmp_path / "out")
    (tmp_path / "out/000001.png").unlink()
    result = generate(PROMPT, "--num_images", 2, "--resume", "--top_k", 3)
    assert result.code == 2
    assert "top_k was 8 and is 3" in result.err
    assert generate(PROMPT, "--num_images", 2, "--resume").code == 0
    assert pictures(tmp_path / "out") == before


def test_a_folder_with_pictures_is_refused_and_overwrite_replaces_them(generate, tmp_path):
    generate(PROMPT, "--num_images", 3)
    (tmp_path / "out/notes.txt").write_text("mine")
    result = generate(PROMPT)
    assert result.code == 2
    assert "--resume" in result.err
    assert generate(PROMPT, "--overwrite").code == 0
    assert list(pictures(tmp_path / "out")) == ["000000.png"]
    assert (tmp_path / "out/notes.txt").exists()


def test_filmstrip_has_one_tile_per_scale(generate, tmp_path):
    generate(PROMPT, "--save_scales", "--seed", 0)
    strip, picture = pixels(tmp_path / "out/000000_scales.png"), pixels(tmp_path / "out/000000.png")
    assert strip.shape[1] == 3 * 32 + 2 * 4
    assert (strip[:32, -32:] == picture).all()


def test_npz_has_the_adm_layout(generate, models, tmp_path):
    words = ["--model", models["class"], "--class_labels", "owl", 1, "--num_images", 2, "--npz"]
    assert generate(*words).code == 0
    with np.load(tmp_path / "out/samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (4, 32, 32, 3)
    assert (images[2] == pixels(tmp_path / "out/000002.png")).all()
    assert labels.tolist() == [3, 3, 1, 1]


def test_preset_fid_draws_every_class_and_later_flags_win(generate, models, tmp_path):
    words = ["--model", models["class"], "--preset", "fid", "--num_images", 1, "--top_k", 5]
    assert generate(*words, "--seed", 0).code == 0
    recipe = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert recipe["class_labels"] == ["0", "1", "2", "3"]
    assert (recipe["guidance_scale"], recipe["top_p"], recipe["top_k"]) == ([2.5], 0.96, 5)


def test_print_config_shows_what_a_preset_means(generate, tmp_path):
    result = generate(PROMPT, "--preset", "visual", "--top_p", 0.5, "--print_config")
    content = yaml.safe_load(result.out)
    assert content["guidance_scale"] == 6.0
    assert content["more_smooth"] is True
    assert content["top_p"] == 0.5
    assert not (tmp_path / "out").exists()


def test_prompt_file(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na green cross\n")
    assert generate("--prompt_file", tmp_path / "prompts.txt").code == 0
    assert len(pictures(tmp_path / "out")) == 2


def test_quiet_prints_nothing(generate):
    result = generate(PROMPT, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def launch(rank: int, world: int, port: int, words: list[str]) -> subprocess.Popen[str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "nextscale", *words],
        env={**os.environ, **ranks, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("bad", [False, True])
def test_two_processes_draw_what_one_draws(generate, tmp_path, bad):
    generate(PROMPT, "--num_images", 5, "--npz")
    target = str(tmp_path / ("out" if bad else "two"))
    words = ["generate", "--config", str(tmp_path / "out/recipe.yaml"), "--output_dir", target]
    port = free_port()
    workers = [launch(rank, 2, port, words) for rank in range(2)]
    answers = [worker.communicate(timeout=120) for worker in workers]
    if bad:  # the folder is taken: one plain line, from one process
        assert [worker.returncode for worker in workers] == [2, 2]
        assert sum("is not empty" in err for _, err in answers) == 1
        return
    assert [worker.returncode for worker in workers] == [0, 0], answers
    assert pictures(tmp_path / "out") == pictures(tmp_path / "two")
    first, second = (tmp_path / d / "samples.npz" for d in ("out", "two"))
    with np.load(first) as one, np.load(second) as two:
        assert (one["arr_0"] == two["arr_0"]).all()


def test_imports_nothing_heavy(models, tmp_path):
    """`generate` in one process leaves the large libraries alone, torch._dynamo included."""
    words = ["generate", PROMPT, "--model", models["words"], "--dtype", "float32"]
    words += ["--device", "cpu", "--quiet", "--output_dir", str(tmp_path / "out")]
    code = (
        f"import sys; from nextscale.cli import main; code = main({words!r}); "
        "heavy = {'torchvision', 'accelerate', 'peft', 'transformers', 'open_clip', 'scipy',"
        " 'torch._dynamo', 'sympy'}; print(code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0 []", done.stderr
