"""Say why a policy decided as it did in a run: a sentence for each of the largest changes, and mean effects drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.explain import Explanation, Push
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.experiments.inspect_policy import (
    MIN_EFFECT,
    MOST_CHANGES,
    PUSHES,
    Change,
    changes_to_explain,
    mean_effects,
    reasons_of,
)
from trainpilot.experiments.report.formatting import Cell, listed, percent
from trainpilot.experiments.report.run_charts import EFFECT_INKS, FIELDS, Drawn, control_panels, effects_panel
from trainpilot.experiments.report.tables import Column, Line, Table
from trainpilot.experiments.report.template import Charts, draw
from trainpilot.experiments.stored_run import StoredRun


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Why one change was made."""

    number: str
    """The number that stands at the change in the charts."""
    head: str
    """When, and what was changed."""
    body: str
    """What spoke for it, and what against it."""


@dataclass(frozen=True, kw_only=True)
class Why:
    """What the page says about the reasons of one run's decisions."""

    name: str
    controls: Charts
    """The controls with the numbers of the sentences."""
    effects: Charts | None
    effect_names: tuple[tuple[str, str], ...]
    """Colour and name of the controls whose choices the effects are on."""
    sentences: tuple[Sentence, ...]
    notes: tuple[str, ...]
    """What is left out, and what speaks against the explanation."""
    fields: Table | None
    """Meaning of the fields that the sentences name."""


def why(index: int, each: Drawn, reference: Sequence[Drawn]) -> Why | None:
    """Return why a run was steered as it was; `None` for a run without a policy.

    Args:
        index: Keeps the ids of the charts apart.
        each: The run.
        reference: The reference run, if there is one, drawn behind it.
    """
    run = each.run
    try:
        reasons = reasons_of(run)
    except (ValueError, OSError) as error:
        nothing = draw("", (), ())
        note = f"The decisions cannot be explained: {error}."
        return Why(
            name=each.look.title, controls=nothing, effects=None, effect_names=(), sentences=(), notes=(note,),
            fields=None,
        )  # fmt: skip
    if reasons is None:
        return None
    explanation = reasons.explanation
    changes = changes_to_explain(run.records)
    told = changes[:MOST_CHANGES]
    numbers = [(change.decision, change.control, str(n)) for n, change in enumerate(told, start=1)]
    panels, unmoved = control_panels([*reference, each], numbers)
    names, fields = mean_effects(explanation)
    notes = [reasons.warning] if reasons.warning else []
    if len(changes) > len(told):
        notes.append(f"{len(changes) - len(told)} further changes are not explained here.")
    if not changes:
        notes.append("The policy changed nothing.")
    pushes = [explanation.pushes(change.decision, FIELDS[change.control], PUSHES) for change in told]
    return Why(
        name=each.look.title,
        controls=draw(f"why{index}x", panels, (), note=never_changed(unmoved)),
        effects=_effects(index, names, fields),
        effect_names=tuple((EFFECT_INKS[FIELDS.index(name)], name.replace("_", " ")) for name in names),
        sentences=tuple(
            _sentence(number, run, change, explanation, found)
            for (_, _, number), change, found in zip(numbers, told, pushes, strict=True)
        ),
        notes=tuple(notes),
        fields=_meanings([push.field for found in pushes for push in _strong(found)] + [name for name, _ in fields]),
    )


def never_changed(names: Sequence[str]) -> str:
    """Return the note about controls that never moved."""
    return f"Never changed: {listed(list(names))}." if names else ""


def _effects(index: int, names: Sequence[str], fields: Sequence[tuple[str, Sequence[float]]]) -> Charts | None:
    if not fields:
        return None
    readable = [(name.replace("_", " "), effects) for name, effects in fields]
    return draw(f"effect{index}x", [effects_panel(names, readable)], ())


def _sentence(
    number: str, run: StoredRun, change: Change, explanation: Explanation, pushes: Sequence[Push]
) -> Sentence:
    rival = int(explanation.rivals[change.decision, change.control])
    choice = _choice(run.records[change.decision], change, rival)
    head = f"{percent(run.began_at(change.decision))}: {FIELDS[change.control].replace('_', ' ')} {choice}."
    strong = _strong(pushes)
    parts = [
        f"{side}: {', '.join(_told(push) for push in strong if (push.effect > 0) is supports)}."
        for side, supports in (("For it", True), ("Against it", False))
        if any((push.effect > 0) is supports for push in strong)
    ]
    return Sentence(
        number=number, head=head, body=" ".join(parts) or "No field that changed during the run stands out."
    )


def _strong(pushes: Sequence[Push]) -> list[Push]:
    return [push for push in pushes if abs(push.effect) >= MIN_EFFECT]


def _choice(record: DecisionRecord, change: Change, rival: int) -> str:
    choices = ACTION_FIELDS[change.control].choices
    text = choices[record.requested[change.control]] + (f" rather than {choices[rival]}" if rival >= 0 else "")
    if change.n_decisions > 1:
        text += f", the largest step of a move x{change.factor:.2g} in {change.n_decisions} decisions"
    return text


def _told(push: Push) -> str:
    side = "low" if push.value < push.mean else "high"
    return f"{push.field.replace('_', ' ')} {push.value:.3g} ({side}, {push.effect:+.1f})"


def _meanings(names: Sequence[str]) -> Table | None:
    """Return what the named fields mean."""
    fields = {field.name: field for field in OBSERVATION_FIELDS}
    lines = tuple(
        Line(name=name.replace("_", " "), cells=(Cell(text=fields[name].unit), Cell(text=fields[name].meaning)))
        for name in sorted(set(names))
        if name in fields
    )
    columns = (Column(name="unit", left=True), Column(name="meaning", wraps=True))
    return Table(corner="field", columns=columns, groups=(("", lines),)) if lines else None
