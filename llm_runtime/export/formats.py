"""Write a trained model in a smaller format, and load what was written with plain transformers.

`FORMATS` lists the formats. `bf16`, `int8`, `int4` and `int8-torchao` are model folders, `gguf-q8` and `gguf-q4` are
files for llama.cpp. `pot`, `pot2` and `bcq` are folders in float32 whose weights lie on the grid of a shift-and-add
format: they show what it costs in loss, and nothing here runs them faster or packs them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainpilot.llm_runtime.export import gguf_file
from trainpilot.llm_runtime.export.gguf_file import GgufType, gguf_fault, write_gguf
from trainpilot.llm_runtime.models import LoadedModel
from trainpilot.llm_runtime.quantisation import (
    binary_bits_per_weight,
    binary_codes,
    group_size_for,
    integer_bits_per_weight,
    integer_codes,
    power_bits_per_weight,
    powers_of_two,
)

GGUF_NAME = "model.gguf"
GROUP_SIZE = 32
"""Weights that share a scale in `int4` and `bcq`, by default."""
BINARY_BITS = 3
"""Sign vectors of `bcq`."""
SCALE_TYPE = torch.bfloat16
"""Type of the scales of `int8` and `int4`, and of their weights that are not quantised."""

Kind = Literal["float", "compressed-tensors", "torchao", "gguf", "grid"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that a model can be written in."""

    about: str
    """What is in it, and who reads it."""
    kind: Kind
    bits: int
    """Bits of a code."""
    package: str | None = None
    """Package that writes and reads it."""
    extra: str = "export"
    """Extra of trainpilot that installs the package."""
    gguf_type: GgufType | None = None

    @property
    def missing(self) -> bool:
        """Whether the package is not installed."""
        return self.package is not None and find_spec(self.package) is None


_PACKED = "compressed-tensors folder for transformers, which unpacks it to floats, and vLLM (not tried)"
_GRID = "as floats on their grid, since nothing packs or runs them"

FORMATS: dict[str, Format] = {
    "bf16": Format(about="bfloat16 weights; transformers", kind="float", bits=16),
    "int8": Format(
        about=f"8-bit integers, a scale per row; {_PACKED}",
        kind="compressed-tensors",
        bits=8,
        package="compressed_tensors",
    ),
    "int4": Format(
        about=f"4-bit integers, a scale per group; {_PACKED}",
        kind="compressed-tensors",
        bits=4,
        package="compressed_tensors",
    ),
    "int8-torchao": Format(
        about="8-bit integers, a scale per row; torchao folder for transformers",
        kind="torchao",
        bits=8,
        package="torchao",
        extra="torchao",
    ),
    "gguf-q8": Format(
        about="Q8_0, embeddings too; llama.cpp, transformers", kind="gguf", bits=8, package="gguf", gguf_type="Q8_0"
    ),
    "gguf-q4": Format(
        about="Q4_0, embeddings too; llama.cpp, transformers", kind="gguf", bits=4, package="gguf", gguf_type="Q4_0"
    ),
    "pot": Format(about=f"signed powers of two; {_GRID}", kind="grid", bits=4),
    "pot2": Format(about=f"sums of two signed powers of two; {_GRID}", kind="grid", bits=8),
    "bcq": Format(about=f"three sign vectors, scales of two powers of two; {_GRID}", kind="grid", bits=BINARY_BITS),
}


def format_fault(name: str, loaded: LoadedModel) -> str | None:
    """Return why the model cannot be written in a format here, as the rest of a line; `None` where it can."""
    chosen, model = FORMATS[name], loaded.model
    if chosen.missing:
        package = (chosen.package or "").replace("_", "-")
        return f'needs the package {package}, got no such package; run: pip install "trainpilot[{chosen.extra}]"'
    if chosen.kind == "gguf":
        return gguf_fault(model, loaded.tokenizer)
    if chosen.kind in ("compressed-tensors", "torchao") and any(
        isinstance(module, Conv1D) for module in block_matrices(model).values()
    ):
        return f"needs layers of nn.Linear, got Conv1D in the architecture {model.config.model_type!r}"
    if chosen.kind != "float" and not block_matrices(model):
        return f"needs linear layers, got none in the architecture {model.config.model_type!r}"
    return None


def block_matrices(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers of the blocks by name: all but the output layer."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module for name, module in found.items() if module is not head}


def write_format(name: str, loaded: LoadedModel, source: Path, folder: Path, group_size: int) -> float:
    """Write the model into the empty `folder`, and return the bits per weight of its quantised matrices.

    Args:
        name: One of `FORMATS`, with which `format_fault` finds no fault.
        loaded: The model; it is left as it is.
        source: The folder that it came from.
        folder: Where the files go.
        group_size: Weights that share a scale in `int4` and `bcq`, where it divides the rows; else a smaller number
            or whole rows.
    """
    chosen = FORMATS[name]
    if chosen.gguf_type is not None:
        write_gguf(loaded.model, loaded.tokenizer, folder / GGUF_NAME, chosen.gguf_type)
        return gguf_file.BITS_PER_WEIGHT[chosen.gguf_type]
    loaded.tokenizer.save(folder)
    if chosen.kind == "torchao":
        return _write_torchao(loaded, source, folder)
    model = copy.deepcopy(loaded.model)
    if chosen.kind == "float":
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        return 16.0
    group = group_size_for((_as_rows(module).shape[1] for module in block_matrices(model).values()), group_size)
    if chosen.kind == "compressed-tensors":
        return _write_packed(model, folder, chosen.bits, group if chosen.bits == 4 else None)
    rounding, bits_of = _grids(group)[name]
    bits = _mean_bits(model, bits_of)
    for module in block_matrices(model).values():
        _set_rows(module, rounding(_as_rows(module)))
    model.save_pretrained(folder)
    return bits


def load_format(name: str, folder: Path) -> PreTrainedModel:
    """Load what `write_format` wrote with plain transformers, to compute in float32."""
    file = {"gguf_file": GGUF_NAME} if FORMATS[name].kind == "gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    return cast("PreTrainedModel", model.eval())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class RoundedModel:
    """A model as a format leaves it, to compute in float32, and what its file takes."""

    model: PreTrainedModel
    n_parameters: int
    bits_per_weight: float
    """Of the quantised matrices, with their scales."""
    weight_bytes: int
    """Of the files with weights; of a packed file for formats that are written unpacked."""


def rounded_model(name: str | None, loaded: LoadedModel, group_size: int = GROUP_SIZE) -> RoundedModel:
    """Return the model as a format leaves it: written, and loaded again. It is left as it is.

    Args:
        name: One of `FORMATS` but `int8-torchao`, with which `format_fault` finds no fault; `None` is float32, for
            which the model itself is returned.
        loaded: The model.
        group_size: As in `write_format`.
    """
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    if name is None:
        return RoundedModel(loaded.model.eval(), n_parameters, 32.0, 4 * n_parameters)  # type: ignore[no-untyped-call]
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # Windows keeps files that are mapped
        folder = Path(scratch)
        bits = write_format(name, loaded, folder, folder, group_size)
        size = packed_bytes(name, loaded, bits) or weight_bytes(folder)
        return RoundedModel(load_format(name, folder), n_parameters, bits, size)


def packed_bytes(name: str, loaded: LoadedModel, bits_per_weight: float) -> int | None:
    """Return the bytes of a packed file, with the rest in bfloat16; `None` for formats whose file is packed."""
    if FORMATS[name].kind != "grid":
        return None
    packed = sum(module.weight.numel() for module in block_matrices(loaded.model).values())
    rest = sum(parameter.numel() for parameter in loaded.model.parameters()) - packed
    return round(packed * bits_per_weight / 8 + rest * SCALE_TYPE.itemsize)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder that hold weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


def _grids(group: int | None) -> Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]]:
    """Return the rounding and the bits per weight, given the columns, of each shift-and-add format."""
    return {
        "pot": (powers_of_two, power_bits_per_weight),
        "pot2": (partial(powers_of_two, terms=2), partial(power_bits_per_weight, terms=2)),
        "bcq": (
            partial(binary_codes, bits=BINARY_BITS, group_size=group),
            partial(binary_bits_per_weight, BINARY_BITS, group),
        ),
    }


def _mean_bits(model: PreTrainedModel, bits_of: Callable[[int], float]) -> float:
    """Return the mean bits per weight of the quantised matrices."""
    shapes = [_as_rows(module).shape for module in block_matrices(model).values()]
    return sum(bits_of(columns) * rows * columns for rows, columns in shapes) / sum(map(_product, shapes))


def _product(shape: torch.Size) -> int:
    return shape.numel()


def _as_rows(module: nn.Linear | Conv1D) -> Tensor:
    """Return the weights with a row for each output; `Conv1D` keeps them the other way round."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _set_rows(module: nn.Linear | Conv1D, rows: Tensor) -> None:
    module.weight.data = (rows.T if isinstance(module, Conv1D) else rows).contiguous()


def _write_packed(model: PreTrainedModel, folder: Path, bits: int, group: int | None) -> float:
    """Write packed integers as compressed-tensors does, with the scales of `integer_codes`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    strategy: dict[str, Any] = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, dynamic=False, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ignored = [name for name, module in model.named_modules() if module is head]
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored, format="pack-quantized")
    mean_bits = _mean_bits(model, partial(integer_bits_per_weight, bits, group))
    apply_quantization_config(model, config)
    for module in block_matrices(model).values():
        rounded = integer_codes(_as_rows(module), bits, group, SCALE_TYPE)
        module.weight.data = rounded.weights()
        module.weight_scale.data = rounded.scales
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.to(SCALE_TYPE).save_pretrained(folder)  # type: ignore[arg-type]
    compressor.update_config(folder)
    return mean_bits


def _write_torchao(loaded: LoadedModel, source: Path, folder: Path) -> float:
    """Write torchao's tensors of 8-bit integers, which transformers reads; what is not quantised stays in float32."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    wanted = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=wanted)
    model.save_pretrained(folder)
    return _mean_bits(loaded.model, partial(integer_bits_per_weight, 8, None, scale_bits=32))
