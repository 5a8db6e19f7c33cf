"""Run `trainpilot cut`: cut a trained model down, write the smaller one, and say what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from trainpilot.experiments.export.source import Source, check_out, model_folder_of, read_source
from trainpilot.experiments.options import CutOptions
from trainpilot.experiments.progress import quiet
from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime.cuts import (
    PARTS,
    UNITS,
    Cut,
    Part,
    count_parameters,
    cut_to_parameters,
    cut_to_sizes,
    part_fault,
    part_size,
    size_of_share,
)
from trainpilot.llm_runtime.export.inference import mean_loss
from trainpilot.llm_runtime.files import system_errors, whole_folder, write_json
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.live_run import resolve_device
from trainpilot.llm_runtime.models import LoadedModel, load_saved
from trainpilot.llm_runtime.process import use_threads

RESULT = "cut.json"
"""File that marks a folder as a cut model."""


@dataclass(frozen=True, kw_only=True)
class ModelFigures(JsonRecord):
    """A model's sizes and losses."""

    n_parameters: int
    sizes: Mapping[str, int]
    """Feed-forward channels, groups of heads and blocks, as far as they can be cut."""
    validation_loss: float
    """On the text by which cuts were chosen, in nats/token."""
    test_loss: float
    """On text that had no part in it, in nats/token."""


@dataclass(frozen=True, kw_only=True)
class CutResult(JsonRecord):
    """What a cut did; losses are those before any further training."""

    source: str
    architecture: str
    text: Sequence[str]
    sequence_length: int
    validation_tokens: int
    test_tokens: int
    before: ModelFigures
    after: ModelFigures
    """Of the model as it was written, read again."""
    cuts: Sequence[Cut]
    """In their order."""
    versions: Mapping[str, str] = field(default_factory=dict)


def cut(options: CutOptions, console: Console) -> CutResult:
    """Write the smaller model that `options` describe, and return the figures. All is written, or nothing.

    Raises:
        ValueError: an option cannot be used; nothing has been written then.
    """
    shares: dict[Part, float] = {part: share for part in PARTS if (share := getattr(options, part)) is not None}
    if not shares and options.parameters is None:
        raise ValueError("one of ffn, heads, depth and parameters must be given, got none; try --parameters 0.5")
    check_out(options.out, options.path, RESULT, "an earlier cut")
    device = resolve_device(options.device)
    model_folder_of(options.path)
    use_threads(options.threads)
    with quiet():
        source = read_source(options.path, options.text, options.sequence_length)
    model = source.loaded.model.to(device)  # type: ignore[arg-type]
    sizes = _sizes(source.loaded, shares)
    with console.status("cut") as status:

        def progress(made: Cut) -> None:
            status.update(f"{made.part} {made.size}: {made.n_parameters:,} parameters, loss {made.loss:.4f}")

        if options.parameters is None:
            smaller, cuts = cut_to_sizes(model, sizes, source.validation, progress)
        else:
            wanted = _parameters(options.parameters, source.loaded)
            smaller, cuts = cut_to_parameters(model, wanted, source.validation, least=sizes, progress=progress)
        with whole_folder(options.out) as folder, system_errors(options.out, SafetensorError):
            result = _written(source, LoadedModel(smaller, source.loaded.tokenizer, pretrained=True), cuts, folder)
    print_result(result, options.out, console)
    return result


def _sizes(loaded: LoadedModel, shares: Mapping[Part, float]) -> dict[Part, int]:
    """Return the sizes that the shares stand for. Raises `ValueError` where a part cannot be cut."""
    for part in shares:
        if fault := part_fault(loaded.model, part):
            raise ValueError(f"{part} {fault}; leave --{part} out")
    return {part: size_of_share(loaded.model, part, share) for part, share in shares.items()}


def _parameters(given: float, loaded: LoadedModel) -> int:
    present = count_parameters(loaded.model)
    wanted = int(given * present if given < 1 else given)
    if not 1 <= wanted < present:
        raise ValueError(f"parameters must be fewer than the model's {present:,}, got {given:,.10g}")
    return wanted


def _written(source: Source, smaller: LoadedModel, cuts: Sequence[Cut], folder: Path) -> CutResult:
    """Write the smaller model into a folder, read it again, and return and write the figures."""
    with quiet():
        smaller.save(folder)
        again = load_saved(folder)
    again.model.to(smaller.model.device).eval()  # type: ignore[arg-type]
    result = CutResult(
        source=str(source.path),
        architecture=smaller.model.config.model_type,
        text=source.text,
        sequence_length=source.windows.shape[1] - 1,
        validation_tokens=source.validation[:, 1:].size,
        test_tokens=source.windows[:, 1:].size,
        before=_figures(source.loaded, source),
        after=_figures(again, source),
        cuts=cuts,
        versions=versions(),
    )
    write_json(folder / RESULT, result.to_json())
    return result


def _figures(loaded: LoadedModel, source: Source) -> ModelFigures:
    model = loaded.model
    return ModelFigures(
        n_parameters=count_parameters(model),
        sizes={part: part_size(model, part) for part in PARTS if part_fault(model, part) is None},
        validation_loss=mean_loss(model, source.validation),
        test_loss=mean_loss(model, source.windows),
    )


def print_result(result: CutResult, out: Path, console: Console) -> None:
    """Print the cuts in their order, and both models beside each other."""
    before, after = result.before, result.after
    table = Table(title=escape(f"{result.source}: {result.architecture}"), title_style="bold")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for part, size in before.sizes.items():
        table.add_row(UNITS[part], f"{size:,}", f"{after.sizes[part]:,}")  # type: ignore[index]
    table.add_row("parameters", f"{before.n_parameters:,}", f"{after.n_parameters:,}")
    table.add_row("validation loss, nats/token", f"{before.validation_loss:.4f}", f"{after.validation_loss:.4f}")
    table.add_row("test loss, nats/token", f"{before.test_loss:.4f}", f"{after.test_loss:.4f}")
    console.print(table)
    steps = ", ".join(f"{each.part} {each.size_before} to {each.size} ({each.loss:.3f})" for each in result.cuts)
    console.print(f"in this order, with the validation loss after each: {steps}", highlight=False)
    goes_on = f"to train it on: trainpilot replay --model {out} --teacher {result.source}"
    console.print(escape(f"written to {out} with {RESULT}; {goes_on}"), soft_wrap=True, highlight=False)
