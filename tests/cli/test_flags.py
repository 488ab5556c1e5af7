from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest

from nextscale.cli import COMMANDS, main
from nextscale.cli.console import Output
from nextscale.cli.encode import EncodeConfig
from nextscale.cli.flags import parse
from nextscale.cli.generate import GenerateConfig, expand_preset
from nextscale.cli.recipes import recipe_names, to_yaml
from nextscale.control.train import ControlTrainingConfig
from nextscale.tokenizers.train import TokenizerTrainingConfig
from nextscale.var.train import TransformerTrainingConfig


def flags(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


DATA = set(
    [
        "dataset",
        "resolution",
        "image_column",
        "label_column",
        "caption_column",
        "num_classes",
        "num_images",
        "strict",
    ]
)
TRAINING = set(
    [
        "output_dir",
        "seed",
        "max_train_steps",
        "max_train_minutes",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_hold",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_final",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "weight_decay",
        "weight_decay_end",
        "max_grad_norm",
        "mixed_precision",
        "compile",
        "use_ema",
        "ema_decay",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "validation_steps",
        "logging_steps",
        "report_to",
        "dataloader_num_workers",
    ]
)


def test_the_flags_of_the_main_commands():
    """People type these: change them on purpose only."""
    assert flags(Output) == {"config", "quiet", "json", "print_config", "debug"}
    assert flags(GenerateConfig) == set(
        [
            "model",
            "revision",
            "local_files_only",
            "device",
            "dtype",
            "guidance_scale",
            "guidance_schedule",
            "guidance_end",
            "guidance_threshold",
            "control_guidance_scale",
            "control_in_negative",
            "top_k",
            "top_p",
            "temperature",
            "temperature_end",
            "temperature_power",
            "more_smooth",
            "num_candidates",
            "prompts",
            "prompt",
            "prompt_file",
            "class_labels",
            "negative_prompt",
            "num_images",
            "seed",
            "preset",
            "output_dir",
            "batch_size",
            "save_scales",
            "npz",
            "resume",
            "overwrite",
            "lora",
            "lora_scale",
            "start",
            *("search", "search_reward", "search_samples", "search_steps"),
            *("search_model", "search_weight", "download"),
            *("num_inference_steps", "eta"),
            "control_image",
            "control_type",
            "control_scale",
            "control",
            "control_extract",
            "control_start",
            "control_end",
            "control_mask",
            "guess_mode",
        ]
    )
    assert flags(EncodeConfig) == DATA | set(
        [
            "output_dir",
            "tokenizer",
            "num_validation_images",
            "batch_size",
            "shard_size",
            "overwrite",
            "device",
            "dtype",
        ]
    )
    assert DATA | TRAINING | {"tokenizer"} <= flags(TokenizerTrainingConfig)
    assert DATA | TRAINING | {"tokenizer", "transformer", "model", "generation"} <= flags(
        TransformerTrainingConfig
    )
    assert DATA | TRAINING | {"model", "control_type", "architecture"} <= flags(
        ControlTrainingConfig
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_ends_with_an_example(run, command):
    result = run(*command.split(), "--help")
    assert result.code == 0
    assert "example:" in result.out
    assert f"nextscale {command}" in result.out
    assert "--debug" in result.out


def test_overview_is_fast_and_imports_no_torch():
    code = (
        "import sys; from nextscale.cli import main; main(['--help']); "
        "print(sorted({'torch', 'numpy', 'tyro', 'yaml', 'rich', 'tqdm'} & set(sys.modules)))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 1.5  # 0.1 s on an idle machine
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def test_unknown_commands_suggest_near_names(run):
    result = run("genrate", "x")
    assert result.code == 2
    assert "Did you mean generate?" in result.err
    assert "Did you mean train tokenizer?" in run("train", "tokeniser").err
    assert run("train").code == 2
    assert run().code == 2
    assert "train var" in run("train", "--help").out
    assert run("--version").out.startswith("nextscale ")


def test_unknown_flags_suggest_near_names(run):
    result = run("generate", "a red circle", "--top-pp", "0.5")
    assert result.code == 2
    assert "--top_p" in result.err
    assert "Traceback" not in result.err


def test_dashes_and_underscores(run):
    one = run("generate", "x", "--print-config", "--num-images", 3, "--no-more-smooth")
    other = run("generate", "x", "--print_config", "--num_images", 3, "--no_more_smooth")
    assert (one.code, one.out, one.err) == (other.code, other.out, other.err)


def test_preset_stands_where_it_was_written():
    words = expand_preset(["--top_k", "5", "--preset", "fid", "--top_p", "0.5"])
    assert words[:4] == ["--top_k", "5", "--preset", "fid"]
    assert words[-2:] == ["--top_p", "0.5"]
    assert expand_preset(["--preset=fid"])[1:] == words[4:-2]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def read(recipe: str, *words: str) -> TokenizerTrainingConfig:
    arguments = ["--config", recipe, *words]
    config, _ = parse("train tokenizer", TokenizerTrainingConfig, arguments, about="", example="")
    return config


def test_recipe_values_of_every_kind(recipe):
    path = recipe(
        "# A test.\ncommand: train tokenizer\noutput_dir: out\nuse_ema: true\nkmeans_start: false\n"
        "max_grad_norm: null\nlearning_rate: 1.0e-3\n"
        "tokenizer:\n  scales: [1, 2, 4]\n  channels: 32\n  cosine: true\n"
    )
    config = read(path, "--tokenizer.channels", "64")
    assert config.use_ema is True
    assert config.kmeans_start is False
    assert config.max_grad_norm is None
    assert config.learning_rate == 1e-3
    assert config.tokenizer.scales == (1, 2, 4)
    assert config.tokenizer.channels == 64  # the person's flag wins
    assert config.tokenizer.cosine is True


def test_resolved_recipe_reads_back(recipe):
    config = TokenizerTrainingConfig(output_dir="out", max_grad_norm=1.5, strict=True)
    text = to_yaml("train tokenizer", dataclasses.asdict(config))
    assert read(recipe(text)) == config


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_parse(run, name):
    content = run("recipes", "show", name).out
    command = next(c for c in COMMANDS if f"command: {c}\n" in content)
    result = run(*command.split(), "--config", name, "--print_config")
    assert result.code == 0, result.err
    assert f"command: {command}\n" in result.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 0.1", ["--learning_rat", "0.1"]),
        ("learning_rate: fast", ["--learning_rate", "fast"]),
        ("tokenizer: {chanels: 16}", ["--tokenizer.chanels", "16"]),
        ("learning_rate: -1.0", ["--learning_rate", "-1.0"]),
        ("lr_scheduler: steps", ["--lr_scheduler", "steps"]),
    ],
)
def test_recipe_errors_are_flag_errors(run, recipe, text, words):
    by_recipe = run("train", "tokenizer", "--output_dir", "x", "--config", recipe(text))
    by_flag = run("train", "tokenizer", *words, "--output_dir", "x")
    assert by_recipe.code == by_flag.code == 2
    assert by_recipe.err == by_flag.err
    assert by_recipe.err


def test_recipe_of_another_command(run, recipe):
    result = run("train", "var", "--config", recipe("command: train tokenizer\n"))
    assert result.code == 2
    assert "is for `nextscale train tokenizer`" in result.err
    assert run("train", "var", "--config", recipe("[1, 2")).err.count("\n") == 1
    assert "Give a YAML file or one of" in run("train", "var", "--config", "nope").err


def test_recipe_list_flags_do_not_swallow_prompts(recipe):
    path = recipe("guidance_scale: [1.0, 2.0]\nprompt: [a red circle]\n")
    words = ["a green cross", "--config", path]
    config, _ = parse("generate", GenerateConfig, words, about="", example="")
    assert config.prompts == ("a green cross",)
    assert config.guidance_scale == (1.0, 2.0)


def test_recipes_commands(run, tmp_path):
    names = set(run("recipes", "ls", "--json").json)
    assert names == set(recipe_names())
    name = sorted(names)[0]
    assert run("recipes", "cp", name, tmp_path).code == 0
    assert (tmp_path / f"{name}.yaml").exists()
    assert run("recipes", "cp", name, tmp_path).code == 2
    assert run("recipes", "show", "nope").code == 2


def test_a_closed_pipe_is_no_error():
    code = f"{sys.executable} -m nextscale --help | head -n 1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


def test_main_takes_the_process_arguments_by_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nextscale", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("nextscale")
