"""Measure a model in use: its loss on fixed windows, and what a request costs in the program that runs it.

A request is one prompt that is read at once (prefill) and some tokens that are generated one after the other, each
the most likely one (decoding). `Transformers` and `LlamaCpp` answer it; `measure_turn_about` measures several in turn.

Shapes: n windows, T tokens of a window, P tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergySource
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.timing import Cost, alternate

LOSS_TOKENS_AT_ONCE = 4096
"""Tokens that go through the model together when its loss is measured."""
VISIT_S = 0.05
"""Seconds for which a request is repeated on end, at least: short, so that some visits find the machine idle."""
LIMIT_S = 4.0
"""No further round of measurements begins after so many seconds; there are four at least."""


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: npt.NDArray[Any]) -> float:
    """Return the mean cross-entropy of the next token over windows of shape (n, T + 1), in nats/token."""
    batch = torch.from_numpy(windows).to(model.device)
    total = 0.0
    for part in torch.split(batch, max(LOSS_TOKENS_AT_ONCE // windows.shape[1], 1)):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits  # (n, T, V)
        losses = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        total += float(losses.double().sum())
    return total / batch[:, 1:].numel()


@dataclass(frozen=True, kw_only=True)
class RequestCost(JsonRecord):
    """What one request costs. What was not measured, or drowned in noise, is `None`."""

    prompt_tokens: int
    new_tokens: int
    """Tokens that are generated after the first one, which comes with the prompt."""
    prefill: Cost
    """Of reading the prompt and giving the first token."""
    request: Cost
    """Of all of it."""
    energy_source: EnergySource | None
    spread: float
    """Slowest over fastest measurement of the request: 1 on an idle machine."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompt that are read in a second."""
        return self.prompt_tokens / self.prefill.time_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens that are generated in a second, without the prompt's share."""
        decoding_s = self.request.time_s - self.prefill.time_s
        return self.new_tokens / decoding_s if decoding_s > 0 else None

    @property
    def prefill_j_per_token(self) -> float | None:
        """Joules per token of the prompt."""
        return None if self.prefill.energy_j is None else self.prefill.energy_j / self.prompt_tokens

    @property
    def decode_j_per_token(self) -> float | None:
        """Joules per generated token, without the prompt's share."""
        if self.request.energy_j is None or self.prefill.energy_j is None:
            return None
        decoding_j = self.request.energy_j - self.prefill.energy_j
        return decoding_j / self.new_tokens if decoding_j > 0 else None


class Runtime(Protocol):
    """A loaded model that answers the same request again and again."""

    def prefill(self) -> None:
        """Read the prompt and give the first token."""

    def request(self) -> None:
        """Do the same and generate all further tokens."""


class Transformers:
    """Runs a model in transformers, on the device that it is on, with its cache of keys and values.

    Args:
        model: The model, in evaluation mode.
        prompt: Token ids, shape (P,).
        new_tokens: Tokens to generate after the first.
    """

    def __init__(self, model: PreTrainedModel, prompt: npt.NDArray[Any], new_tokens: int) -> None:
        self._model, self._new_tokens = model, new_tokens
        self._prompt = torch.from_numpy(prompt)[None].to(model.device)
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if last_only else {})

    def prefill(self) -> None:
        """Read the prompt and give the first token."""
        self._generate(0)

    def request(self) -> None:
        """Do the same and generate all further tokens."""
        self._generate(self._new_tokens)

    @torch.inference_mode()
    def _generate(self, new_tokens: int) -> None:
        output = self._model(input_ids=self._prompt, **self._options)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = self._model(input_ids=token, past_key_values=output.past_key_values, **self._options)


class LlamaCpp:
    """Runs a GGUF file in llama.cpp, on the processor; needs the package `xllamacpp`.

    Args:
        file: The GGUF file.
        prompt: Token ids, shape (P,).
        new_tokens: Tokens to generate after the first.
    """

    PACKAGE = "xllamacpp"

    def __init__(self, file: Path, prompt: npt.NDArray[Any], new_tokens: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(len(prompt) + new_tokens + 1, 64)
        parameters.n_parallel, parameters.n_gpu_layers = 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.verbosity = -1  # silent
        self._server = xllamacpp.Server(parameters)
        self._new_tokens = new_tokens
        fixed = {"temperature": 0, "cache_prompt": False, "ignore_eos": True}
        self._question: dict[str, Any] = {"prompt": prompt.tolist(), **fixed}

    def prefill(self) -> None:
        """Read the prompt and give the first token."""
        self.complete(1)

    def request(self) -> None:
        """Do the same and generate all further tokens."""
        self.complete(1 + self._new_tokens)

    def complete(self, tokens: int) -> str:
        """Return the text of the next `tokens` tokens."""
        answer = self._server.handle_completions({**self._question, "max_tokens": tokens})
        return str(answer["choices"][0]["text"])


def measure_turn_about(
    runtimes: Mapping[str, Runtime],
    meter: EnergyMeter,
    device: str,
    *,
    prompt_tokens: int,
    new_tokens: int,
    limit_s: float = LIMIT_S,
) -> dict[str, RequestCost]:
    """Return what a request costs in each runtime, measured in turn, so that they share the noise of the machine.

    Args:
        runtimes: The loaded models, by name.
        meter: Energy meter of the device that they run on.
        device: Name of the device that they run on.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens that are generated after the first.
        limit_s: No further round begins after so many seconds.
    """
    passes = {}
    for name, runtime in runtimes.items():
        passes[name, "prefill"] = runtime.prefill
        passes[name, "request"] = runtime.request
    visit_s = max(VISIT_S, meter.resolution_s)
    wait = partial(synchronise, torch.device(device))
    found = alternate(passes, meter, visit_s=visit_s, limit_s=limit_s, wait=wait)
    return {
        name: RequestCost(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            prefill=found[name, "prefill"].cost,
            request=found[name, "request"].cost,
            energy_source=found[name, "request"].source,
            spread=found[name, "request"].spread,
        )
        for name in runtimes
    }
