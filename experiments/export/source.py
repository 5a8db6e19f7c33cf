"""Read a trained model that is to be exported or cut, from a run's folder or a model folder, and its held text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainpilot.experiments.one_writer import lock_file
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.batches import Batch, fixed_batch
from trainpilot.llm_runtime.data.corpus import load_corpus
from trainpilot.llm_runtime.files import real_path
from trainpilot.llm_runtime.live_run import EVALUATION_SHARE, MAX_EVALUATION_TOKENS, MIN_EVALUATION_TOKENS
from trainpilot.llm_runtime.models import LoadedModel, context_length, load_saved
from trainpilot.llm_runtime.plain_values import read_json

RESULT = "export.json"
"""File that marks a folder as an export."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model and the windows of text that its loss is measured on."""

    path: Path
    """Folder that was given."""
    model_folder: Path
    """Folder of the model in it."""
    loaded: LoadedModel
    text: tuple[str, ...]
    windows: Batch
    """Evenly spaced over the test split, shape (n, T + 1)."""
    validation: Batch
    """The same of the validation split."""
    trained_tokens: int | None
    """Tokens that the run has trained on; `None` for a model folder."""
    run_test_loss: float | None
    """Test loss in the run's summary."""


def model_folder_of(path: Path) -> Path:
    """Return the model folder of a run's folder, or the folder itself where it is one.

    Raises:
        ValueError: there is no model in it.
    """
    if not path.is_dir():
        raise ValueError(f"path must be a run's folder or a model folder, got {path}, which is no folder")
    if (path / "model" / "config.json").is_file():
        return path / "model"
    config = _read(path / "config.json")
    if "model_type" in config:
        return path
    if "model" in config and "sequence_length" in config:
        diverged = _read(path / "summary.json").get("diverged")
        why = "it diverged" if diverged else "it is not finished; run the same replay again"
        raise ValueError(f"path: the run in {path} has left no model/, as {why}")
    raise ValueError(
        f"path must be a run's folder with model/ or a folder that save_pretrained wrote, got {path}, which is neither"
    )


def read_source(path: Path, text: tuple[str, ...] | None, sequence_length: int | None) -> Source:
    """Load the model of a run or of a model folder, and its test windows.

    A run's text and sequence length are its own, unless others are given, and its windows are those of its summary.
    For a model folder they are the defaults of a run.

    Raises:
        ValueError: the folder, the model or the text cannot be used.
    """
    folder = model_folder_of(path)
    run = _read(path / "config.json") if folder != path else {}
    summary = _read(path / "summary.json") if folder != path else {}
    loaded = load_saved(folder)
    loaded.model.eval()  # type: ignore[no-untyped-call]
    sources = text if text is not None else tuple(run.get("text", RunConfig.text))
    length = sequence_length or int(run.get("sequence_length", RunConfig.sequence_length))
    limit = context_length(loaded.model.config)
    if length < 1 or (limit is not None and length > limit):
        raise ValueError(f"sequence_length must be in [1, {limit}], the model's context in tokens, got {length}")
    tokens = summary.get("tokens") or int(run.get("tokens", 0))
    wanted = min(max(EVALUATION_SHARE * int(run.get("tokens", 0)), MIN_EVALUATION_TOKENS), MAX_EVALUATION_TOKENS)
    corpus, count = load_corpus(sources, loaded.tokenizer), max(int(wanted) // length, 1)
    own = text is None and sequence_length is None
    return Source(
        path=path,
        model_folder=folder,
        loaded=loaded,
        text=sources,
        windows=fixed_batch(corpus.test, length, count),
        validation=fixed_batch(corpus.validation, length, count),
        trained_tokens=tokens or None,
        run_test_loss=summary.get("final_test_loss") if own else None,
    )


def check_out(out: Path, source: Path, marker: str = RESULT, earlier: str = "an earlier export") -> None:
    """Refuse a folder with anything in it but an earlier result, which will be replaced.

    Args:
        out: The folder.
        source: Folder of the model that is read.
        marker: File that marks a folder as an earlier result.
        earlier: What such a result is called.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    if real_path(source).is_relative_to(real_path(out)):
        raise ValueError(f"out must not hold the model that is read, got {out}; choose another --out")
    if out.is_dir() and set(out.iterdir()) - {lock_file(out)} and not (out / marker).is_file():
        raise ValueError(f"out must be new, empty or {earlier}, got {out}; choose another --out")


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing where it is missing or damaged."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
