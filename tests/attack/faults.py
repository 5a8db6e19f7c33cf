"""Faults of data, meter, clock, callbacks and policies: a run ends, is no worse for it, and records nothing untrue."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _hostile import BATCH, SEQUENCES
from torch import Tensor

from tests.attack.attempts import Attempt, Failures, Outcome, Promise
from tests.attack.faulty_parts import CALLBACKS, CLOCKS, LIMIT_W, METERS, POLICIES, POSITIONS, TickingClock
from tests.attack.small_runs import SHORT, FaultyRun, Spoil, implausible, keep, plain
from trainpilot.agents.steering.contract import QualityContract

TITLE = "faults of data, meter, clock, callbacks and policy"
SLACK = 0.01
NOISE_SEEDS = range(4)
PROMISES = {
    "data": Promise(
        f"Bad batches cost a steered run no more than a loop that skips them, within {SLACK:g} nats/token and the seed "
        "noise.",
        "losses that are NaN, infinite or huge, batches of random bytes, exceptions, and losses and batches of the "
        "wrong type; once, in a row and again and again; with and without `data=` and a contract",
    ),
    "contract": Promise(
        "A contract is not called broken where the data did it and the policy changed nothing.",
        "the same bad batches under a contract against an earlier run, with a policy that keeps everything",
    ),
    "meter": Promise(
        "A meter never stops a run, and changes nothing about it.",
        "meters that raise, return nothing or text, or joules that are NaN, infinite, negative, falling, frozen or "
        "beyond the power limit; the weights must equal those of an undisturbed run to the last bit",
    ),
    "clock": Promise(
        "A clock never stops a run, and changes nothing about it.",
        "clocks that go back, stand still, raise, or tell NaN, infinity, text or nothing; weights as above",
    ),
    "callbacks": Promise(
        "`on_decision`, `validate` and the position of the data never stop a run.",
        "each raises, or returns NaN, infinity, text, nothing or a lie; weights as above",
    ),
    "policy": Promise(
        "A policy that fails is left out, and the run follows its base schedule.",
        "policies that raise, exit, or return nothing, text, NaN, too few or too many choices, or change what they are "
        "shown; weights as above",
    ),
    "plausible": Promise(
        "Nothing implausible is recorded: unknown seconds, joules and losses stay unknown.",
        "telemetry and summary of the runs with these meters, clocks and callbacks: finite, not negative, not zero "
        "joules in a positive time, not beyond the power limit",
    ),
}


def prepare(shared: Path) -> None:
    """Train undisturbed runs, which the disturbed ones are compared with."""
    losses = [FaultyRun("none", seed=seed).train().loss() for seed in NOISE_SEEDS]
    run = FaultyRun("none").train()
    told = [(record.telemetry.budget_used, record.telemetry.train_loss) for record in run.steering.records]
    known = {
        "reference": told,
        "noise": 2 * statistics.stdev(losses),
        "short": FaultyRun("none", **SHORT).train().weights(),
        "skipping": {
            when: FaultyRun("none", sequences=_left(strikes)).train().loss() for when, strikes in WHENS.items()
        },
    }
    (shared / "known.json").write_text(json.dumps(known), encoding="utf-8")
    notes = {"seed_noise": known["noise"], "slack": SLACK}
    (shared / "notes.json").write_text(json.dumps(notes), encoding="utf-8")


def attempts(seed: int, shared: Path) -> list[Attempt]:
    """Return one attempt for each fault and each kind of run that meets it."""
    known = json.loads((shared / "known.json").read_text(encoding="utf-8"))
    lists = (_data, _meters, _clocks, _callbacks, _policies)
    return list(itertools.chain.from_iterable(make(known) for make in lists))


def example(place: Path) -> Outcome:
    """Train with a meter that raises."""
    known = {"short": FaultyRun("none", **SHORT).train().weights()}
    return _undisturbed("meter", known, "keep", lambda: _metered(METERS["a meter that raises later"]), place)


# Data -----------------------------------------------------------------------------------------------------------------

When = Callable[[int], bool]
WHENS: Mapping[str, When] = {
    "once, at a tenth": lambda i: i == 30,
    "once, at the middle": lambda i: i == 150,
    "three in a row": lambda i: 150 <= i < 153,
    "every 20th step": lambda i: i % 20 == 7,
}
RARE = "once, at the middle"


def _left(strikes: When) -> int:
    """Return the sequences that a loop trains on which skips the bad batches."""
    return SEQUENCES - BATCH * sum(map(strikes, range(SEQUENCES // BATCH)))


def _times(factor: float) -> Spoil:
    return lambda run, number, step, rows: step.backward(lambda batch: run.model(batch) * factor, batch=rows)


def _returns(value: Callable[[Tensor], Any]) -> Spoil:
    return lambda run, number, step, rows: step.backward(lambda batch: value(run.model(batch)), batch=rows)


def _random(run: FaultyRun, number: int, step: Any, rows: Tensor) -> None:
    chance = torch.Generator().manual_seed(number)
    step.backward(run.model, batch=torch.randint(0, 256, rows.shape, generator=chance))


def _raises(run: FaultyRun, number: int, step: Any, rows: Tensor) -> None:
    raise OSError("the disk of the data is gone")


def _on(batch: Callable[[Tensor], Any]) -> Spoil:
    return lambda run, number, step, rows: step.backward(run.model, batch=batch(rows))


DATA: Mapping[str, tuple[Spoil, tuple[str, ...]]] = {
    "a loss of NaN": (_times(math.nan), tuple(WHENS)),
    "an infinite loss": (_times(math.inf), tuple(WHENS)[1:3]),
    "a loss of 1e30": (_times(1e30), (RARE,)),
    "a negative loss": (_times(-1.0), (RARE,)),
    "batches of random bytes": (_random, tuple(WHENS)),
    "an exception": (_raises, tuple(WHENS)),
    "a loss of None": (_returns(lambda loss: None), (RARE,)),
    "a loss that is a text": (_returns(lambda loss: "2.0"), (RARE,)),
    "a loss that is a number": (_returns(float), (RARE,)),
    "a loss without a gradient": (_returns(lambda loss: loss.detach()), (RARE,)),
    "a loss of two values": (_returns(lambda loss: loss.repeat(2)), (RARE,)),
    "a complex loss": (_returns(lambda loss: loss.to(torch.complex64)), (RARE,)),
    "no batch": (_on(lambda rows: None), (RARE,)),
    "an empty batch": (_on(lambda rows: rows[:0]), (RARE,)),
    "half a batch": (_on(lambda rows: rows[: len(rows) // 2]), (RARE,)),
    "twice the batch": (_on(lambda rows: torch.cat([rows, rows])), (RARE,)),
    "bytes beyond the vocabulary": (_on(lambda rows: rows + 1_000), (RARE, "every 20th step")),
    "a batch of floats": (_on(lambda rows: rows / 2), (RARE,)),
}
"""By fault: the backward pass, and when it strikes."""
DATA_FORMS = ("keep", "keep, data", "keep, contract, data", "base schedule")


def _data(known: Mapping[str, Any]) -> Iterator[Attempt]:
    for (fault, (spoil, whens)), form in itertools.product(DATA.items(), DATA_FORMS):
        for when in whens:
            promises = ("data", "contract") if "contract" in form else ("data",)
            run = partial(_with_bad_data, spoil, when, form, known)
            yield Attempt(name=f"{fault}, {when}; {form}", promises=promises, run=run)


def _with_bad_data(spoil: Spoil, when: str, form: str, known: Mapping[str, Any], place: Path) -> Outcome:
    def backward(run: FaultyRun, number: int, step: Any, rows: Tensor) -> None:
        (spoil if WHENS[when](number) else plain)(run, number, step, rows)

    reference = tuple((share, loss) for share, loss in known["reference"])
    contract = QualityContract(reference=reference, max_slowdown=1e9) if "contract" in form else None
    policy = "none" if form == "base schedule" else keep
    run = FaultyRun(policy, data="data" in form or None, contract=contract).train(backward)
    increase, bound = run.loss() - known["skipping"][when], SLACK + known["noise"]
    failures: Failures = {}
    if not increase <= bound:
        failures["data"] = f"{increase:+.3f} nats/token against a loop that skips them, promised {bound:+.3f}"
    if contract is not None and run.steering.summary()["contract"]["held"] is False:
        failures["contract"] = f"held is False: {run.steering.summary()['contract']['broken_because']}"
    return failures, increase


# Meter, clock, callbacks, policies ------------------------------------------------------------------------------------


def _meters(known: Mapping[str, Any]) -> Iterator[Attempt]:
    for name, make in METERS.items():
        for policy in ("none", "keep"):
            run = partial(_undisturbed, "meter", known, policy, partial(_metered, make))
            yield Attempt(name=f"{name}; {policy}", promises=("meter", "plausible"), run=run)


def _metered(make: Callable[[TickingClock], Any]) -> dict[str, Any]:
    clock = TickingClock()
    return {"around": {"clock": clock, "meter": make(clock)}}


def _around(name: str, make: Callable[[], Any]) -> dict[str, Any]:
    return {"around": {name: make()}}


def _positioned(make: Callable[[], Any]) -> dict[str, Any]:
    return {"data": make()}


def _same(value: Any) -> Any:
    return value


def _clocks(known: Mapping[str, Any]) -> Iterator[Attempt]:
    for name, make in CLOCKS.items():
        for policy in ("none", "keep"):
            run = partial(_undisturbed, "clock", known, policy, partial(_around, "clock", make))
            yield Attempt(name=f"{name}; {policy}", promises=("clock", "plausible"), run=run)


def _callbacks(known: Mapping[str, Any]) -> Iterator[Attempt]:
    for name, call in CALLBACKS.items():
        which = name.split()[0]
        for policy in ("none", "keep"):
            run = partial(_undisturbed, "callbacks", known, policy, partial(_around, which, partial(_same, call)))
            yield Attempt(name=f"{name}; {policy}", promises=("callbacks", "plausible"), run=run)
    for name, make_data in POSITIONS.items():
        run = partial(_undisturbed, "callbacks", known, "keep", partial(_positioned, make_data))
        yield Attempt(name=f"data {name}", promises=("callbacks", "plausible"), run=run)
    for name in ("whose state_dict raises", "whose load_state_dict raises"):
        run = partial(_taken_back, POSITIONS[name])
        yield Attempt(name=f"data {name}, in a run that is taken back", promises=("callbacks",), run=run)


def _taken_back(make_data: Callable[[], Any], place: Path) -> Failures:
    """Spoil most of an interval of a run, and compare with a run that has no data to take back."""

    def backward(run: FaultyRun, number: int, step: Any, rows: Tensor) -> None:
        (_times(math.nan) if 40 <= number < 44 else plain)(run, number, step, rows)

    run, other = (FaultyRun(keep, data=data, **SHORT).train(backward) for data in (make_data(), None))
    if not other.steering.summary()["rollbacks"]:
        raise RuntimeError("the run was not taken back")
    if run.errors:
        return {"callbacks": f"{run.errors} exceptions in the loop"}
    return {} if run.weights() == other.weights() else {"callbacks": "other weights than without data"}


def _policies(known: Mapping[str, Any]) -> Iterator[Attempt]:
    for name, policy in POLICIES.items():
        run = partial(_undisturbed, "policy", known, policy, dict)
        yield Attempt(name=f"a policy that {name}", promises=("policy",), run=run)


def _undisturbed(
    promise: str, known: Mapping[str, Any], policy: Any, options: Callable[[], dict[str, Any]], place: Path
) -> Failures:
    """Train with a fault that must not touch the weights."""
    failures: Failures = {}
    run = FaultyRun(keep if policy == "keep" else policy, **SHORT, **options()).train()
    if run.errors:
        failures[promise] = f"{run.errors} exceptions in the loop"
    elif run.weights() != known["short"]:
        failures[promise] = "other weights than without the fault"
    if promise != "policy" and (reason := implausible(run, LIMIT_W)):
        failures["plausible"] = reason
    return failures
