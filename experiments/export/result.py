"""Define the figures of an export, which the table, the picture and `export.json` show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from trainpilot.experiments.analysis.multiplier import product_score
from trainpilot.llm_runtime.export.inference import RequestCost
from trainpilot.llm_runtime.json_records import JsonRecord

FP32, FP32_LLAMA_CPP = "fp32", "llama.cpp fp32"
"""Rows of the unquantised model."""
UNKNOWN = "-"


@dataclass(frozen=True, kw_only=True)
class ExportRow(JsonRecord):
    """One format of the model."""

    format: str
    about: str
    """What is in it, and who reads it."""
    folder: str | None
    """Where it lies; `None` for the unquantised model, which is not written again."""
    runtime: str
    """Program that loads it, with the device and type that it was measured in."""
    weight_bytes: int
    """Size of the files with weights."""
    packed_bytes: int | None
    """Size that a packed file would have, for formats that are written unpacked."""
    bits_per_weight: float
    """Of the quantised matrices, with their scales; as a packed file has it."""
    test_loss: float
    """Of the weights in the file, computed in float32, in nats/token."""
    cost: RequestCost | None
    """What a request costs; `None` where nothing runs the format."""
    unquantised_loss: float
    """Of the same text, in nats/token."""
    unquantised_cost: RequestCost | None
    """Of the unquantised model in the same program, measured in turn with this format."""

    @property
    def perplexity_ratio(self) -> float:
        """P: perplexity over that of the unquantised model."""
        return math.exp(self.test_loss - self.unquantised_loss)

    @property
    def time_ratio(self) -> float | None:
        """T: seconds of a request over those of the unquantised model in the same program."""
        if self.cost is None or self.unquantised_cost is None:
            return None
        return self.cost.request.time_s / self.unquantised_cost.request.time_s

    @property
    def energy_ratio(self) -> float | None:
        """E: joules of a request over those of the unquantised model in the same program."""
        if self.cost is None or self.unquantised_cost is None:
            return None
        own, base = self.cost.request.energy_j, self.unquantised_cost.request.energy_j
        return own / base if own is not None and base else None

    @property
    def score(self) -> float | None:
        """P^1.5 (a T + b E) with a = b = 1/2, of which less is better; T alone where the joules are unknown."""
        if self.time_ratio is None:
            return None
        bounded = product_score(self.test_loss, self.unquantised_loss, time=self.time_ratio, energy=self.energy_ratio)
        return bounded.low

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Tokens of the prompt that are read in a second."""
        return None if self.cost is None else self.cost.prefill_tokens_per_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens that are generated in a second."""
        return None if self.cost is None else self.cost.decode_tokens_per_s

    @property
    def prefill_j_per_token(self) -> float | None:
        """Joules per token of the prompt."""
        return None if self.cost is None else self.cost.prefill_j_per_token

    @property
    def decode_j_per_token(self) -> float | None:
        """Joules per generated token."""
        return None if self.cost is None else self.cost.decode_j_per_token

    def figures(self) -> dict[str, float | None]:
        """Return what follows from the measurements, for readers of the JSON file."""
        return {
            "perplexity_ratio": self.perplexity_ratio,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_j_per_token": self.prefill_j_per_token,
            "decode_j_per_token": self.decode_j_per_token,
            "time_ratio": self.time_ratio,
            "energy_ratio": self.energy_ratio,
            "score": self.score,
        }


@dataclass(frozen=True, kw_only=True)
class ExportResult(JsonRecord):
    """All formats of one model."""

    source: str
    architecture: str
    n_parameters: int
    trained_tokens: int | None
    """Tokens that the run has trained on; `None` where that is not known."""
    text: Sequence[str]
    test_tokens: int
    sequence_length: int
    run_test_loss: float | None
    """Test loss in the run's summary, which that of the row `fp32` repeats."""
    group_size: int
    device: str
    threads: int
    energy_meter: str
    """What the joules are, in words."""
    rows: Sequence[ExportRow]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Formats that were not written, each with the reason."""
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> dict[str, object]:
        """Return the content of `export.json`: the fields, and in every row also what follows from them."""
        values = self.to_json()
        rows = [{**written, **row.figures()} for written, row in zip(values["rows"], self.rows, strict=True)]
        return {**values, "rows": rows}


COLUMNS = {
    "format": "format",
    "MB": "size, MB",
    "of fp32": "size over fp32",
    "bits": "bits per weight",
    "loss": "test loss, nats/token",
    "ppl": "perplexity over fp32",
    "prefill": "prefill, tokens/s",
    "decode": "decoding, tokens/s",
    "mJ/prompt": "mJ per token of prompt",
    "mJ/new": "mJ per generated token",
    "score": "score",
}
"""Short names of the table's columns, and whole ones."""
TERMINAL = ("format", "MB", "bits", "loss", "ppl", "prefill", "decode", "mJ/new", "score")
"""Columns that fit into 80 characters."""
BUSY = 1.5
"""A spread above this says that other programs had a large part in the seconds."""


def cells(row: ExportRow, fp32_bytes: int) -> dict[str, str]:
    """Return the cells of a format's line in the table, by column."""
    size = row.packed_bytes or row.weight_bytes
    unpacked = "~" if row.packed_bytes else ""
    return {
        "format": row.format,
        "MB": f"{unpacked}{size / 1e6:,.3g}",
        "of fp32": f"{unpacked}{size / fp32_bytes:.3f}",
        "bits": f"{row.bits_per_weight:.2f}",
        "loss": f"{row.test_loss:.4f}",
        "ppl": signed_percent(row.perplexity_ratio - 1),
        "prefill": _number(row.prefill_tokens_per_s, ",.0f"),
        "decode": _number(row.decode_tokens_per_s, ",.0f"),
        "mJ/prompt": _number(milli(row.prefill_j_per_token), ".3g"),
        "mJ/new": _number(milli(row.decode_j_per_token), ".3g"),
        "score": _number(row.score, ".3f"),
    }


def heading(result: ExportResult) -> str:
    """Return what the table is about, as one line."""
    known = result.trained_tokens
    trained = "" if known is None else f", trained on {known / result.n_parameters:.3g} tokens per parameter"
    text = f"{result.test_tokens:,} test tokens of {', '.join(result.text)}"
    return f"{result.source}: {result.architecture}, {result.n_parameters:,} parameters{trained}; {text}"


def explanations(result: ExportResult) -> list[str]:
    """Return what a reader of the table must know, one sentence or two each."""
    costs = [row.cost for row in result.rows if row.cost is not None]
    lines = [
        "loss: on the test text with the weights in the file, in nats/token, computed in float32; ppl: perplexity over "
        "that of fp32. bits: per weight of the quantised matrices, with its share of the scales. A model that saw few "
        "tokens per parameter loses less by quantisation than others.",
    ]
    if costs:
        first, threads = costs[0], "1 thread" if result.threads == 1 else f"{result.threads} threads"
        lines.append(
            f"prefill, decode: tokens/s of one request with {first.prompt_tokens} tokens of prompt and "
            f"{first.new_tokens} generated ones, {threads}, in turn with fp32 in the same program."
        )
        lines.append(f"mJ: {result.energy_meter}." + (_ESTIMATE if first.energy_source == "estimated" else ""))
        lines.append("score: P^1.5 (T + E) / 2 against fp32 in the same program, of which less is better.")
        spread = median(cost.spread for cost in costs)
        if spread > BUSY:
            lines.append(
                f"Other programs were busy (slowest request {spread:.1f} times the fastest): repeat it when idle."
            )
    lines += [f"{name}: left out, as it {why}." for name, why in result.left_out.items()]
    return lines + [f"{note}." for note in result.notes]


_ESTIMATE = " Such joules are seconds times an assumed power: they say no more than the seconds do."


def markdown(result: ExportResult) -> str:
    """Return the table and its explanations as a Markdown page."""
    fp32_bytes = result.rows[0].weight_bytes
    lines = [" | ".join(COLUMNS.values()), " | ".join(["---", *["---:"] * (len(COLUMNS) - 1)])]
    lines += [" | ".join(cells(row, fp32_bytes).values()) for row in result.rows]
    table = "\n".join(f"| {line} |" for line in lines)
    notes = "\n".join(f"* {line}" for line in explanations(result))
    formats = "\n".join(f"* {row.format}: {row.about}. Measured in: {row.runtime}." for row in result.rows)
    return f"# Export\n\n{heading(result)}\n\n{table}\n\n{notes}\n\n## Formats\n\n{formats}\n"


def signed_percent(share: float) -> str:
    """Return a share as percent with its sign; one that rounds to zero has none."""
    rounded = round(100 * share, 2)
    return f"{rounded:+.2f} %" if rounded else "0.00 %"


def milli(value: float | None) -> float | None:
    """Return a thousand times a number that may be unknown."""
    return None if value is None else 1000 * value


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
