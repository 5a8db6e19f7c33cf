"""Run `trainpilot export`: check what is asked for, write the formats, and show what each is worth."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from trainpilot.experiments.export.chart import draw_export
from trainpilot.experiments.export.job import ExportJob
from trainpilot.experiments.export.result import (
    TERMINAL,
    ExportResult,
    ExportRow,
    cells,
    explanations,
    heading,
    markdown,
)
from trainpilot.experiments.export.source import RESULT, Source, check_out, model_folder_of, read_source
from trainpilot.experiments.inspect_policy import titled_table
from trainpilot.experiments.options import ExportOptions
from trainpilot.experiments.progress import quiet
from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime.export.formats import FORMATS, format_fault
from trainpilot.llm_runtime.files import system_errors, whole_folder, write_json
from trainpilot.llm_runtime.live_run import resolve_device
from trainpilot.llm_runtime.models import context_length
from trainpilot.llm_runtime.precision import device_name
from trainpilot.llm_runtime.process import use_threads

ALL = "all"


def export(options: ExportOptions, console: Console) -> ExportResult:
    """Write the formats that `options` name, measure them, and return the figures. All is written, or nothing.

    Raises:
        ValueError: an option cannot be used; nothing has been written then.
    """
    names = _wanted(options.format)
    check_out(options.out, options.path)
    _check_counts(options)
    device = resolve_device(options.device)
    model_folder_of(options.path)
    threads = use_threads(options.threads)
    with quiet():
        source = read_source(options.path, options.text, options.sequence_length)
    faults = {name: fault for name in names if (fault := format_fault(name, source.loaded)) is not None}
    if faults and options.format != ALL:
        name, fault = next(iter(faults.items()))
        raise ValueError(f"format {name!r} {fault}, or leave it out of --format")
    _check_request(source, options)
    with whole_folder(options.out) as folder, system_errors(options.out, SafetensorError):
        job = ExportJob(source, options, str(device))
        rows = job.run([name for name in names if name not in faults], folder, console)
        result = ExportResult(
            source=str(options.path),
            architecture=source.loaded.model.config.model_type,
            n_parameters=source.loaded.n_parameters,
            trained_tokens=source.trained_tokens,
            text=source.text,
            test_tokens=source.windows[:, 1:].size,
            sequence_length=source.windows.shape[1] - 1,
            run_test_loss=source.run_test_loss,
            group_size=options.group_size,
            device=device_name(device),
            threads=threads,
            energy_meter=job.meter(str(device)).description,
            rows=rows,
            left_out=faults,
            notes=_notes(rows, options),
            versions=versions(),
        )
        job.close()
        write_json(folder / RESULT, result.content())
        (folder / "export.md").write_text(markdown(result), encoding="utf-8")
        draw_export(result, folder / "export.png")
    print_result(result, options.out, console)
    return result


def _wanted(formats: str) -> list[str]:
    if formats == ALL:
        return list(FORMATS)
    names = [name.strip() for name in formats.split(",")]
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"format must be {ALL}, or among {', '.join(FORMATS)}, got {name!r}")
    return list(dict.fromkeys(names))


def _check_counts(options: ExportOptions) -> None:
    for name in ("prompt_tokens", "new_tokens"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


def _check_request(source: Source, options: ExportOptions) -> None:
    limit = context_length(source.loaded.model.config)
    if limit is not None and options.speed and options.prompt_tokens + options.new_tokens >= limit:
        raise ValueError(
            f"prompt_tokens + new_tokens must stay below the model's context of {limit} tokens, got "
            f"{options.prompt_tokens} + {options.new_tokens}; give fewer, or --no-speed"
        )


def _notes(rows: list[ExportRow], options: ExportOptions) -> list[str]:
    """Return what was not measured, with the way to it."""
    kinds = {FORMATS[row.format].kind for row in rows if row.folder is not None and row.cost is None}
    found = []
    if "gguf" in kinds and options.speed:
        found.append('GGUF was not timed, as xllamacpp is missing; pip install "trainpilot[llama-cpp]"')
    if "grid" in kinds:
        found.append(
            "pot, pot2, bcq: nothing here packs or runs them; ~ is the size of a packed file, and their folders hold "
            "floats"
        )
    return found


def print_result(result: ExportResult, out: Path, console: Console) -> None:
    """Print the table and what a reader of it must know."""
    table = titled_table(escape(heading(result)), *TERMINAL)
    table.columns[0].no_wrap = True
    for row in result.rows:
        found = cells(row, result.rows[0].weight_bytes)
        table.add_row(*(found[name] for name in TERMINAL))
    console.print(table)
    console.print()
    for line in explanations(result):
        console.print(escape(line), highlight=False)
    console.print(f"written to {out}: a folder per format, export.json, export.md, export.png", soft_wrap=True)
