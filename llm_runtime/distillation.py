"""Let a model in training learn from the predictions of another one, its teacher, beside the text itself.

Shapes: B sequences, T tokens of a sequence, V vocabulary; `...` any number of dimensions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from trainpilot.llm_runtime.model_folder import teacher_folder, weights_digest
from trainpilot.llm_runtime.ranges import Range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainpilot.llm_runtime.models import LoadedModel

IGNORED = -100
"""Label of a position that has nothing to predict, as in transformers."""


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Return (1 - w) x cross-entropy + w x T^2 x KL(teacher || student), a scalar in nats/token.

    Both are means over the positions whose label is not -100, computed in float32. No gradient goes to the teacher.
    With a weight of 0 it is the cross-entropy to the last bit.

    Args:
        student_logits: Of the model in training, of shape (..., V).
        teacher_logits: Of the teacher for the same positions, of shape (..., V); compute them under `torch.no_grad()`.
        labels: The token that each position predicts, of shape (...): already shifted by one against the inputs.
        weight: Share w of the teacher, in [0, 1].
        temperature: T, above 0; both models' logits are divided by it before they are compared.

    Raises:
        ValueError: weight or temperature is out of its range, or the shapes do not fit each other.
    """
    Range(0, 1).check("weight", weight)
    Range(0, above=True).check("temperature", temperature)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits {tuple(student_logits.shape)}, got "
            f"{tuple(teacher_logits.shape)}; both models need the same vocabulary"
        )
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape {tuple(student_logits.shape[:-1])}, one for each position of the logits, got "
            f"{tuple(labels.shape)}"
        )
    student, targets = student_logits.float().flatten(0, -2), labels.flatten()
    cross_entropy = F.cross_entropy(student, targets, ignore_index=IGNORED)
    if weight == 0:
        return cross_entropy
    divergence = _divergence(student_logits, teacher_logits.detach(), labels, temperature)
    return (1 - weight) * cross_entropy + weight * divergence


def _divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) per position that has a label, a scalar; logits of shape (..., V)."""
    asked = F.log_softmax(teacher.float() / temperature, dim=-1)
    given = F.log_softmax(student.float() / temperature, dim=-1)
    each = F.kl_div(given, asked, reduction="none", log_target=True).sum(dim=-1)  # (...)
    counted = labels != IGNORED
    return temperature**2 * torch.where(counted, each, 0.0).sum() / counted.sum()


@dataclass(frozen=True)
class Teacher:
    """A trained model whose predictions another one learns from. It is not trained, and keeps its number format."""

    model: PreTrainedModel
    digest: str
    """Of its config and weights."""
    weight: float
    """Share of the teacher in the loss."""
    temperature: float

    @classmethod
    def load(
        cls, folder: str, student: LoadedModel, device: torch.device, weight: float, temperature: float
    ) -> Teacher:
        """Read a teacher from a model folder, or from that of a run which left one.

        Args:
            folder: The folder.
            student: The model that is to learn from it.
            device: Where the teacher computes.
            weight: Share of the teacher in the loss.
            temperature: Divides the logits.

        Raises:
            ValueError: there is no model with weights in the folder, or it has another vocabulary than the student.
        """
        from trainpilot.llm_runtime.models import load_saved

        place = teacher_folder(folder)
        try:
            loaded = load_saved(place, own_precision=True)
        except ValueError as error:
            raise ValueError(f"teacher: {str(error).removeprefix('model: ')}") from error
        _check_vocabulary(loaded, student)
        loaded.model.requires_grad_(requires_grad=False)
        model = loaded.model.to(device).eval()  # type: ignore[arg-type]
        return cls(model, weights_digest(place), weight, temperature)

    @classmethod
    def copy_of(cls, model: PreTrainedModel, weight: float = 0.5, temperature: float = 1.0) -> Teacher:
        """Return a model as it is now as a teacher, which has no digest; the model itself may go on.

        Args:
            model: The model.
            weight: Share of the teacher in the loss.
            temperature: Divides the logits.
        """
        copied = copy.deepcopy(model)
        copied.requires_grad_(requires_grad=False)
        return cls(copied.eval(), "", weight, temperature)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Return the teacher's logits for token ids of shape (B, T), of shape (B, T, V), in its own precision."""
        with torch.autocast(inputs.device.type, enabled=False):
            logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits
        return logits

    def mixed(self, cross_entropy: Tensor, student_logits: Tensor, sequences: Tensor) -> Tensor:
        """Return the loss that the student's gradient is of, as `distillation_loss` does, a scalar in nats/token.

        Args:
            cross_entropy: Mean loss of the student on the sequences, a scalar in nats/token.
            student_logits: Of the student for the first T tokens, of shape (B, T, V).
            sequences: Token ids, of shape (B, T + 1).
        """
        teacher_logits = self.logits(sequences[:, :-1])
        divergence = _divergence(student_logits, teacher_logits, sequences[:, 1:], self.temperature)
        return (1 - self.weight) * cross_entropy + self.weight * divergence


def _check_vocabulary(teacher: LoadedModel, student: LoadedModel) -> None:
    ours, theirs = student.model.config.vocab_size, teacher.model.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"teacher must have the vocabulary of the model that learns from it, {ours} tokens, got {theirs}; "
            "take both from one family, or cut the model out of its teacher with trainpilot cut"
        )
    if student.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        raise ValueError(
            f"teacher must have the tokenizer of the model that learns from it, got another one of {theirs} tokens; "
            "take both from one family, or cut the model out of its teacher with trainpilot cut"
        )
