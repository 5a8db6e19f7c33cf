"""Files that attempts find in their folder: valid ones of every kind that a command reads, and odd ones."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

from live_runs import GPT2, LLAMA, text_by_rule
from policies import zigzag_bundle

REPLAY = {
    "model": "model.json", "text": "text.txt", "tokens": "2560", "batch-size": "4", "sequence-length": "16",
    "decisions": "10", "base-learning-rate": "2e-3", "threads": "1", "device": "cpu",
}  # fmt: skip
"""A replay of a second."""
RECIPE: dict[str, Any] = {
    "simulator": {
        "n_runs": 8, "instances": 16, "seeds": 1, "decisions": 8, "base_schedule": {"schedule": "wsd",
        "warmup_share": 0.1}, "ppo": {"total_decisions": 256, "n_steps": 8, "batch_size": 32, "hidden": [8]},
        "validation": {"instances": 8, "every": 1},
    },
    "ppo": {"total_decisions": 0},
}  # fmt: skip
"""A training of a policy in the simulator alone, of seconds."""
LIVE: dict[str, Any] = {
    **RECIPE,
    "common": {
        "model": "model.json", "text": ["text.txt"], "tokens": 1024, "batch_size": 4, "sequence_length": 16,
        "decisions": 8, "device": "cpu",
    },
    "ppo": {"total_decisions": 24, "n_steps": 8, "batch_size": 8},
    "n_envs": 1,
}  # fmt: skip
"""The same, and then live runs."""
CASES: dict[str, Any] = {
    "common": {
        "text": ["text.txt"], "tokens": 1024, "batch_size": 4, "sequence_length": 16, "decisions": 8,
        "base_learning_rate": 1e-2, "device": "cpu",
    },
    "cases": [{"name": "tiny", "model": "model.json"}],
}  # fmt: skip
SWEEP_COLUMNS = (
    "parameters", "learning_rate", "batch_sequences", "sequence_length", "steps", "final_loss", "schedule",
    "warmup_steps", "end_learning_rate",
)  # fmt: skip
BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def sweep_rows() -> list[dict[str, Any]]:
    """Return nine runs of a sweep with its best inside."""
    rows = []
    for i, rate in enumerate((1e-3, 4e-3, 1.6e-2)):
        for j, batch in enumerate((32, 64, 128)):
            loss = 3.2 + 0.1 * (i - 1) ** 2 + 0.03 * (j - 1) ** 2
            rows.append(
                dict(zip(SWEEP_COLUMNS, (20_000_000, rate, batch, 512, 6_400, loss, "cosine", 100, 0.0), strict=True))
            )
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def valid_files(folder: Path) -> None:
    """Write the files that the valid commands read."""
    import yaml

    (folder / "text.txt").write_text(text_by_rule(16_384), encoding="utf-8")
    (folder / "model.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "gpt2.json").write_text(json.dumps(GPT2), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "live.yaml").write_text(yaml.safe_dump(LIVE), encoding="utf-8")
    (folder / "cases.yaml").write_text(yaml.safe_dump(CASES), encoding="utf-8")
    write_csv(folder / "sweep.csv", sweep_rows())
    zigzag_bundle(folder / "policy.safetensors", decisions=10)


def odd_files(folder: Path) -> None:
    """Write files and folders that no command can use."""
    texts = {
        "empty": "", "empty.json": "", "empty.yaml": "", "words.json": "not JSON", "list.json": "[1, 2]",
        "number.json": "7", "deep.json": "[" * 100_000, "deep.yaml": "[" * 5_000, "list.yaml": "- 1\n- 2\n",
        "anchor.yaml": "a: &a [*a]\n", "tag.yaml": "a: !!python/object/apply:os.system ['touch PWNED']\n",
        "twice.json": '{"model_type": "llama", "hidden_size": 16, "hidden_size": -1}', "short.txt": "too short",
        "empty.csv": "", "words.csv": "a,b\n1,2\n", "control.json": '{"model_type": "\\u001b[2J\\u202e"}',
        "bert.json": json.dumps(BERT), "no_layers.json": json.dumps(LLAMA | {"num_hidden_layers": 0}),
        "typo.json": json.dumps({"hidden_sise" if k == "hidden_size" else k: v for k, v in LLAMA.items()}),
        "nan.json": json.dumps(LLAMA | {"rms_norm_eps": float("nan")}),
        "negative.json": json.dumps(LLAMA | {"hidden_size": -16}),
        "huge.json": json.dumps(LLAMA | {"hidden_size": 10**9}),
        "text_size.json": json.dumps(LLAMA | {"hidden_size": "16"}),
        "unknown.json": json.dumps(LLAMA | {"model_type": "nosuch"}),
        "no_type.json": json.dumps({"hidden_size": 16}),
        "code.json": json.dumps(LLAMA | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary").write_bytes(bytes(range(256)) * 64)
    (folder / "latin1.txt").write_bytes("Straße und Küche ".encode("latin-1") * 2_000)
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (folder / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "binary.safetensors").write_bytes(bytes(range(1, 256)) * 9)
    (folder / "folder" / "inside").mkdir(parents=True)
    (folder / "folder" / "a.txt").write_text("a", encoding="utf-8")
    (folder / "dangling").symlink_to("nowhere/at/all")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    for name, file, text in (
        ("taken-run", "config.json", '{"model": "another"}'),
        ("taken-words", "config.json", "no JSON"),
        ("taken-list", "config.json", "[1]"),
        ("taken-agent", "recipe.json", '{"utility": "another"}'),
        ("taken-other", "mine.txt", "mine"),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(text, encoding="utf-8")


ODD_LINES = ("{}", "[1, 2]", "5", '{"a": 1}', '{"telemetry": {}}', "null", '"text"', "[" * 20_000, "no JSON", "\x00")
"""Lines that no telemetry.jsonl has."""


def odd_run_folders(folder: Path) -> list[str]:
    """Write folders that look like runs, and return their names."""
    names = []
    for number, line in enumerate(ODD_LINES):
        (folder / f"odd-run-{number}").mkdir()
        (folder / f"odd-run-{number}" / "telemetry.jsonl").write_text(line + "\n", encoding="utf-8")
        names.append(f"odd-run-{number}")
    return names


def arguments(command: str, options: dict[str, Any], positional: tuple[str, ...] = ()) -> list[str]:
    """Return a command line.

    An option that is a tuple has several values, one that is `None` has none, and one that is `False` is left out.
    """
    words = [command, *positional]
    for name, value in options.items():
        if value is False:
            continue
        words.append(f"--{name}")
        words += [] if value is None else list(value) if isinstance(value, tuple) else [str(value)]
    return words


def changed(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return options with changes, which come last and are so seen first in a long line."""
    return {name: value for name, value in options.items() if name not in changes} | changes
