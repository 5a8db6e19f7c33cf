"""Write one format after the other, and measure each in turn with the unquantised model in the same program."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from trainpilot.experiments.export.result import FP32, FP32_LLAMA_CPP, ExportRow
from trainpilot.experiments.export.source import Source
from trainpilot.experiments.options import ExportOptions
from trainpilot.experiments.progress import progress_bar, quiet
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.export.formats import (
    FORMATS,
    GGUF_NAME,
    load_format,
    packed_bytes,
    weight_bytes,
    write_format,
)
from trainpilot.llm_runtime.export.gguf_file import write_gguf
from trainpilot.llm_runtime.export.inference import (
    LlamaCpp,
    RequestCost,
    Runtime,
    Transformers,
    mean_loss,
    measure_turn_about,
)

CPU = "cpu"
LLAMA_CPP_ON_CPU = "llama.cpp on cpu"


class ExportJob:
    """Writes and measures the formats of one model.

    Args:
        source: What is exported.
        options: Of the command.
        device: Name of the device of all but llama.cpp, which runs on the processor.
    """

    def __init__(self, source: Source, options: ExportOptions, device: str) -> None:
        self.source, self.options, self.device = source, options, device
        self.model = source.loaded.model.to(device)  # type: ignore[arg-type]
        self.meters: dict[str, EnergyMeter] = {}
        """By the device's name."""
        self.request = (np.resize(source.windows[:, :-1], options.prompt_tokens), options.new_tokens)
        self.runs_llama_cpp = options.speed and find_spec(LlamaCpp.PACKAGE) is not None
        self._base_costs: dict[str, list[RequestCost]] = {FP32: [], FP32_LLAMA_CPP: []}
        self._base_loss = 0.0

    def run(self, names: list[str], folder: Path, console: Console) -> list[ExportRow]:
        """Write the formats into `folder`; return their rows behind those of the unquantised model."""
        with progress_bar(console, "export", len(names) + 1) as advance, quiet(), TemporaryDirectory() as scratch:
            advance(0, FP32)
            self._base_loss = mean_loss(self.model, self.source.windows)
            if self.options.speed:
                self._measure(FP32, {FP32: Transformers(self.model, *self.request)}, self.device)
            rows = []
            for step, name in enumerate(names, start=1):
                advance(step, name)
                rows.append(self._row(name, folder / name, Path(scratch)))
            advance(len(names) + 1)
        of_llama_cpp = [row for row in rows if FORMATS[row.format].kind == "gguf"]
        others = [row for row in rows if row not in of_llama_cpp]
        bases = [self._base_row(FP32, self._runtime("float32"))]
        if self._base_costs[FP32_LLAMA_CPP]:
            of_llama_cpp.insert(0, self._base_row(FP32_LLAMA_CPP, LLAMA_CPP_ON_CPU))
        return bases + others + of_llama_cpp

    def _row(self, name: str, target: Path, scratch: Path) -> ExportRow:
        chosen = FORMATS[name]
        target.mkdir()
        bits = write_format(name, self.source.loaded, self.source.model_folder, target, self.options.group_size)
        model = load_format(name, target).to(self.device)  # type: ignore[arg-type]
        loss = mean_loss(model, self.source.windows)
        base, runtime = FP32, self._runtime("float32")
        costs: dict[str, RequestCost] = {}
        if chosen.kind == "gguf":
            base, runtime = FP32_LLAMA_CPP, LLAMA_CPP_ON_CPU
            if self.runs_llama_cpp:
                file = LlamaCpp(target / GGUF_NAME, *self.request)
                costs = self._measure(base, {base: self._unquantised_in_llama_cpp(scratch), name: file}, CPU)
        elif chosen.kind == "grid":
            runtime = "nothing"
        elif self.options.speed:
            if chosen.kind == "float":
                model, runtime = model.bfloat16(), self._runtime("bfloat16")
            own = Transformers(model, *self.request)
            costs = self._measure(base, {base: Transformers(self.model, *self.request), name: own}, self.device)
        return ExportRow(
            format=name,
            about=chosen.about,
            folder=name,
            runtime=runtime,
            weight_bytes=weight_bytes(target),
            packed_bytes=packed_bytes(name, self.source.loaded, bits),
            bits_per_weight=bits,
            test_loss=loss,
            cost=costs.get(name),
            unquantised_loss=self._base_loss,
            unquantised_cost=costs.get(base),
        )

    def _base_row(self, name: str, runtime: str) -> ExportRow:
        """Return a row of the unquantised model, at its least cost of all measurements."""
        cost = min(self._base_costs[name], key=lambda each: each.request.time_s, default=None)
        return ExportRow(
            format=name,
            about="the model as it is, in float32",
            folder=None,
            runtime=runtime,
            weight_bytes=4 * sum(parameter.numel() for parameter in self.model.parameters()),
            packed_bytes=None,
            bits_per_weight=32,
            test_loss=self._base_loss,
            cost=cost,
            unquantised_loss=self._base_loss,
            unquantised_cost=cost,
        )

    def _measure(self, base: str, runtimes: dict[str, Runtime], device: str) -> dict[str, RequestCost]:
        costs = measure_turn_about(
            runtimes,
            self.meter(device),
            device,
            prompt_tokens=self.options.prompt_tokens,
            new_tokens=self.options.new_tokens,
        )
        self._base_costs[base].append(costs[base])
        return costs

    def meter(self, device: str) -> EnergyMeter:
        """Return the energy meter of a device."""
        if device not in self.meters:
            self.meters[device] = select_meter(device)
        return self.meters[device]

    def _runtime(self, number_format: str) -> str:
        return f"transformers on {self.device}, {number_format}"

    def _unquantised_in_llama_cpp(self, scratch: Path) -> Runtime:
        file = scratch / "fp32.gguf"
        if not file.is_file():
            write_gguf(self.source.loaded.model, self.source.loaded.tokenizer, file, "F32")
        return LlamaCpp(file, *self.request)

    def close(self) -> None:
        """Release the meters."""
        for meter in self.meters.values():
            meter.close()
