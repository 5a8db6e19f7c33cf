"""Methods by name: what each one runs, which files it needs, and what cannot be asked for."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_runs import CASE, CONFIG, made_interval, made_ledger, made_result, with_config

from trainpilot.agents import bundle as bundles
from trainpilot.agents.bundle import PolicyBundle, policy_digest
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import N_STACK, Preference
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.experiments.compare.cases import StaticSetting
from trainpilot.experiments.compare.methods import (
    CHECKS,
    COST_NOTES,
    DEFAULT_METHODS,
    OPTIONAL,
    PER_SCHEDULE,
    SEARCHED,
    SIMPLE,
    choose_methods,
    known_methods,
    open_loop_note,
    policy_method,
    rests_on_search,
)
from trainpilot.experiments.compare.programs import direct_program, open_loop_program
from trainpilot.experiments.compare.scheduler import run_workers
from trainpilot.experiments.results import RunResult, RunSpec, SteeringSpec
from trainpilot.experiments.run_store import run_key

N_INPUTS = N_STACK * len(OBSERVATION_FIELDS)
N_CHOICES = sum(len(field.choices) for field in ACTION_FIELDS)


def bundle(path: Path, weight: float = 0.0, **provenance: Any) -> str:
    """Write a policy of ten decisions and return its path."""
    weights = {
        "action.weight": np.full((N_CHOICES, N_INPUTS), weight, np.float32),
        "action.bias": np.zeros(N_CHOICES, np.float32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    PolicyBundle(weights, {"decisions": 10} | provenance).save(path)
    return str(path)


# Names


def test_default_is_everything_that_needs_no_file_and_no_second_search() -> None:
    chosen = choose_methods("default")

    simple = [name for name in SIMPLE if name not in ("law", "greedy")]
    assert chosen.names == DEFAULT_METHODS == (*simple, *SEARCHED)
    assert [method.note.name for method in chosen.direct] == simple
    assert chosen.searched == tuple(SEARCHED)
    assert chosen.optional == ()
    assert chosen.open_loop == ()
    assert not chosen.varies_size


def test_names_are_taken_in_their_order_with_spaces(tmp_path: Path) -> None:
    path = bundle(tmp_path / "agent" / "policy.safetensors")
    chosen = choose_methods(f" tuned-tpe,  seesaw ,policy:{path}, tuned-wsd,open-loop:{path},nsga2")

    names = ("tuned-tpe", "seesaw", f"policy:{path}", "tuned-wsd", f"open-loop:{path}", "nsga2")
    assert chosen.names == names
    assert [method.note.name for method in chosen.direct] == ["seesaw", f"policy:{path}"]
    assert chosen.searched == ("tuned-wsd",)
    assert chosen.optional == ("tuned-tpe", "nsga2")
    assert chosen.varies_size
    assert [note.name for _, note in chosen.open_loop] == [f"open-loop:{path}"]
    assert [note.name for note in chosen.notes(())] == list(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine,flying", "methods must be among constant, cosine, .*; got 'flying'"),
        ("Cosine", "got 'Cosine'"),
        ("policy", "got 'policy'"),
        ("open-loop", "got 'open-loop'"),
        ("tuned-time", "got 'tuned-time'"),  # appears by itself
        ("nsga2-1", "got 'nsga2-1'"),
        ("cosine,linear,cosine", "methods must be named once each, got 'cosine' twice"),
        ("default,tuned", "methods must be named once each, got 'tuned' twice"),
        ("", "methods must name at least one method, got none"),
        (" , ,", "methods must be names with commas between them, got an empty one"),
        ("policy:", "methods: 'policy:' must name a bundle, as in policy:"),
        ("policy:@quality=1", "must name a bundle"),
        ("policy:nowhere.safetensors", "policy: no file nowhere.safetensors"),
        ("open-loop:nowhere.safetensors", "policy: no file nowhere.safetensors"),
        ("quality=1", "got 'quality=1'"),
        ("policy:a.b@start=0", "start must be a factor above 0, as in @start=0.1, got '0'"),
        ("policy:a.b@start=inf", "start must be a factor above 0"),
        ("policy:a.b@start=fast", "got 'fast' in 'policy:a.b@start=fast'"),
        ("policy:a.b@start=1@start=2", "may hold one preference and one start"),
        ("policy:a.b@", "an option must follow each @, got 'policy:a.b@'"),
        ("open-loop:a.b@@unguarded", "an option must follow each @"),
        ("policy:a.b@time=1@energy=1", "may hold one preference and one start"),
        ("policy:a.b@unguarded@unguarded", "may hold one preference and one start, .*, and @unguarded once"),
        ("open-loop:a.b@start=1", "an open loop has no start of its own, .*; leave out @start=1"),
        ("policy:nobody", "no policy named 'nobody' comes with trainpilot"),
        ("pbt@", "a population must have 2 to 1024 runs, as in pbt@8, got 'pbt@'"),
        ("pbt@1", "methods: a population must have 2 to 1024 runs, as in pbt@8, got 'pbt@1'"),
        ("pbt@many", "got 'pbt@many'"),
        ("pbt,pbt", "named once each, got 'pbt' twice"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        choose_methods(text)

    assert "\n" not in str(caught.value)


def test_the_help_names_every_method() -> None:
    with pytest.raises(ValueError) as caught:
        choose_methods("flying")

    assert all(name in str(caught.value) for name in known_methods())


def test_every_method_has_a_note_of_its_own() -> None:
    notes = [*(method.note for method in SIMPLE.values()), *SEARCHED.values(), *OPTIONAL.values(), *COST_NOTES.values()]

    assert len({note.name for note in notes}) == len({note.title for note in notes}) == len(notes)
    assert all(note.description.endswith(".") for note in notes)
    assert {note.kind for note in notes} == {"untuned", "tuned", "heuristic", "tuning-free", "check"}
    assert {note.name for note in notes if note.kind == "check"} == set(CHECKS)


def test_which_methods_rest_on_the_search() -> None:
    assert all(rests_on_search(["cosine", name]) for name in ("tuned", *PER_SCHEDULE, *CHECKS))
    assert set(SEARCHED) == {"tuned", *PER_SCHEDULE, *CHECKS}
    assert not rests_on_search([*SIMPLE, *OPTIONAL, "policy:x", "policy:x@time=1", "open-loop:x"])
    assert rests_on_search(["cosine", "policy:x@time=1@start=3"])


def test_methods_that_appear_by_themselves_get_their_notes() -> None:
    chosen = choose_methods("check-self,nsga2")
    notes = chosen.notes({"check-self", "tuned", "tuned-energy", "nsga2", "nsga2-2", "nsga2-1"})

    assert [note.name for note in notes] == ["check-self", "nsga2", "tuned", "tuned-energy", "nsga2-1", "nsga2-2"]
    assert [(note.title, note.family, note.kind) for note in notes[-2:]] == [
        ("NSGA-II 1", "nsga2", "tuned"),
        ("NSGA-II 2", "nsga2", "tuned"),
    ]


# What each one runs


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("constant", {"schedule": "constant"}),
        ("cosine", {"schedule": "cosine"}),
        ("linear", {"schedule": "linear"}),
        ("wsd", {"schedule": "wsd"}),
        ("schedule-free", {"schedule": "constant", "optimizer": "schedule-free", "base_learning_rate": 2.5e-3}),
        ("prodigy", {"schedule": "cosine", "optimizer": "prodigy", "base_learning_rate": 1.0}),
        # 160,192 parameters, 25,600 tokens: 191 tokens at 0.007887. Intervals of 32 sequences allow batches of 8, of 16
        # tokens each: sqrt(128 / 190.9) = 0.819 of the rate, rounded.
        ("law", {"schedule": "wsd", "batch_size": 8, "base_learning_rate": 0.00646}),
        ("plateau", {"schedule": "constant"}),
        ("greedy", {"schedule": "wsd"}),
        ("noise-batch", {"schedule": "linear", "decisions": 20}),
        ("seesaw", {"schedule": "constant", "decisions": 20}),
        ("gradual-pruning", {"schedule": "linear", "pruning": "magnitude"}),
        ("random", {"schedule": "linear"}),
    ],
)
def test_a_method_changes_of_the_case_what_it_is_about_and_nothing_else(name: str, changes: dict[str, Any]) -> None:
    case = with_config(tokens=25_600, decisions=50)
    spec = SIMPLE[name].spec(case, 3)

    assert spec.config == replace(case.config, seed=3, **changes)


def test_there_is_no_method_that_the_test_above_leaves_out() -> None:
    [marks] = test_a_method_changes_of_the_case_what_it_is_about_and_nothing_else.pytestmark
    assert [name for name, _ in marks.args[1]] == list(SIMPLE)


@pytest.mark.parametrize("name", ["noise-batch", "seesaw"])
def test_a_rule_for_the_batch_takes_no_more_decisions_than_the_case_has(name: str) -> None:
    assert SIMPLE[name].spec(CASE, 0).config.decisions == 10


def test_who_steers() -> None:
    kinds = {name: method.steering.kind for name, method in SIMPLE.items()}
    rules = {"plateau", "greedy", "noise-batch", "seesaw", "gradual-pruning", "random"}

    assert kinds == {name: name if name in rules else "keep" for name in SIMPLE}
    assert not any(method.steering.probe for method in SIMPLE.values())
    assert SIMPLE["plateau"].steering.evaluate_every == 2


def test_a_population_is_one_run_of_several_members() -> None:
    chosen = choose_methods("cosine,pbt,pbt@8")
    four, eight = (method.spec(CASE, 3) for method in chosen.direct[1:])

    assert chosen.populations == ("pbt", "pbt@8")
    assert [method.note.title for method in chosen.direct[1:]] == ["PBT of 4", "PBT of 8"]
    assert four.config == eight.config == replace(CONFIG, schedule="linear", seed=3)
    assert four.steering.settings == {"population": 4, "milestones": 5}
    assert (four.members, eight.members, chosen.direct[0].spec(CASE, 0).members) == (4, 8, 1)
    assert run_key(four) != run_key(eight)


def test_direct_methods_run_with_every_judged_seed() -> None:
    ledger = made_ledger(seeds=(0, 1, 5))
    program = direct_program(ledger, CASE, SIMPLE["wsd"])
    wave = next(program)
    with pytest.raises(StopIteration):
        program.send([made_result(spec) for spec in wave])

    assert [(row.case, row.method, row.role, row.seed) for row in ledger.rows] == [
        ("made", "wsd", "method", seed) for seed in (0, 1, 5)
    ]
    assert [row.key for row in ledger.rows] == [run_key(spec) for spec in wave]


# Policies


def test_a_policy_is_its_file_and_its_preference(tmp_path: Path) -> None:
    path = bundle(tmp_path / "agent" / "policy.safetensors", decisions=5, training_cost={"energy_j": 7.5})
    method = policy_method(f"policy:{path}@quality=1,energy=0,time=1")
    spec = method.spec(with_config(schedule="wsd"), 2)

    assert spec.config == replace(CONFIG, schedule="linear", decisions=5, seed=2)
    assert spec.steering.kind == "policy"
    assert spec.steering.probe
    assert spec.steering.settings["path"] == path
    assert spec.steering.settings["preference"] == "quality=0.5,energy=0,time=0.5"
    assert method.note.title == "agent quality=0.5,time=0.5"
    assert method.note.training_energy_j == 7.5


def test_a_policy_without_a_preference_has_the_usual_one(tmp_path: Path) -> None:
    method = policy_method(f"policy:{bundle(tmp_path / 'agent' / 'policy.safetensors')}")

    assert method.note.title == "agent"
    assert method.note.training_energy_j is None
    assert method.steering.settings["preference"] == "quality=0.7,energy=0.15,time=0.15"


def test_a_preference_may_hold_commas(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors")
    first, second = f"policy:{path}@quality=0.5,energy=0.5", f"policy:{path}@time = 1"
    chosen = choose_methods(f"cosine,{first},{second},open-loop:{path}@quality=1, energy=1,linear")
    plus = policy_method(first.replace(",", "+"))

    assert chosen.names == ("cosine", first, second, f"open-loop:{path}@quality=1, energy=1", "linear")
    assert {method.note.family for method in chosen.direct[2:]} == {f"policy {path}"}
    assert plus.steering == chosen.direct[2].steering
    with pytest.raises(ValueError, match="preference must look like"):
        choose_methods(f"policy:{path}@fun=1,quality=1")


def test_a_policy_is_known_by_its_content(tmp_path: Path) -> None:
    here = bundle(tmp_path / "here" / "policy.safetensors")
    there = bundle(tmp_path / "there" / "policy.safetensors")
    other = bundle(tmp_path / "other" / "policy.safetensors", weight=1.0)
    keys = [run_key(policy_method(f"policy:{path}").spec(CASE, 0)) for path in (here, there, other)]

    assert keys[0] == keys[1] != keys[2]


def test_a_policys_points_and_its_open_loop_are_one_family(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", training_cost={"energy_j": None})
    note = open_loop_note(f"open-loop:{path}")

    assert note.family == policy_method(f"policy:{path}@quality=1").note.family
    assert note.training_energy_j is None


def test_a_policy_that_comes_with_trainpilot_goes_by_its_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "default.safetensors")
    monkeypatch.setattr(bundles, "POLICIES", tmp_path)
    method = policy_method("policy:default@start=0.1@quality=1,time=1")

    assert method.note.title == "default \N{MULTIPLICATION SIGN} 0.1 quality=0.5,time=0.5"
    assert method.note.family == "policy default from 0.1"
    assert str(tmp_path) not in method.note.description
    assert method.steering == policy_method(f"policy:{path}@quality=0.5,time=0.5").steering
    assert open_loop_note("open-loop:default").family == policy_method("policy:default").note.family


def test_a_policy_is_guarded_unless_its_name_says_otherwise(tmp_path: Path) -> None:
    path = bundle(tmp_path / "agent" / "policy.safetensors")
    guarded, bare = (policy_method(f"policy:{path}{suffix}") for suffix in ("", "@unguarded"))
    every = policy_method(f"policy:{path}@start=0.1@unguarded@time=1")

    assert guarded.steering.settings["guardrails"] == asdict(GuardrailSettings())
    assert "guardrails" not in bare.steering.settings
    assert run_key(guarded.spec(CASE, 0)) != run_key(bare.spec(CASE, 0))
    assert (guarded.note.title, bare.note.title) == ("agent", "agent unguarded")
    assert "within guardrails" in guarded.note.description
    assert "without guardrails" in bare.note.description
    assert guarded.note.family != bare.note.family
    assert open_loop_note(f"open-loop:{path}@unguarded").family == bare.note.family
    assert (every.start, every.steering.settings["preference"]) == (0.1, "quality=0,energy=0,time=1")
    assert "guardrails" not in every.steering.settings


def test_a_run_of_yesterday_is_an_unguarded_one(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors")
    settings = {"path": path, "digest": policy_digest(Path(path)), "preference": str(Preference())}
    yesterday = RunSpec(config=policy_method(f"policy:{path}").spec(CASE, 0).config, steering=SteeringSpec(
        kind="policy", settings=settings, probe=True
    ))  # fmt: skip

    assert run_key(policy_method(f"policy:{path}@unguarded").spec(CASE, 0)) == run_key(yesterday)
    assert run_key(policy_method(f"policy:{path}").spec(CASE, 0)) != run_key(yesterday)


def test_a_policy_brings_its_base_schedule(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", base_schedule={"schedule": "wsd", "warmup_share": 0.1})
    spec = policy_method(f"policy:{path}").spec(with_config(warmup_tokens=5), 2)

    assert spec.config == replace(CONFIG, schedule="wsd", warmup_tokens=1_280, seed=2)


def test_a_policy_decides_as_often_as_the_budget_has_steps_at_most(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", decisions=200)

    assert policy_method(f"policy:{path}").spec(CASE, 0).config.decisions == 100


def test_a_start_is_told_in_the_tuned_rate_carried_over_to_the_cases_batch(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", base_schedule={"schedule": "wsd", "warmup_share": 0.1})
    tuned = StaticSetting(learning_rate=4e-3, batch_size=2, schedule="cosine", warmup_share=0.4, precision="bf16")
    first, second = (policy_method(f"policy:{path}@{options}") for options in ("start=0.1@time=1", "time=1@start=0.1"))

    # 0.1 x 4e-3 x sqrt(8 / 2); nothing else is the tuned static's
    assert first.placed(tuned).spec(CASE, 1).config == replace(
        CONFIG, base_learning_rate=8e-4, schedule="wsd", warmup_tokens=1_280, seed=1
    )
    assert first.placed(tuned).spec(CASE, 1) == second.placed(tuned).spec(CASE, 1)
    assert first.placed(tuned).steering == policy_method(f"policy:{path}@time=1").steering


def test_methods_at_the_tuned_rate_are_kept_apart_from_those_without(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors")
    names = ["cosine", f"policy:{path}@start=3", f"policy:{path}"]
    chosen = choose_methods(",".join(names))

    assert [method.note.name for method in chosen.direct] == ["cosine", f"policy:{path}"]
    assert [method.note.name for method in chosen.started] == [f"policy:{path}@start=3"]
    assert [note.name for note in chosen.notes({"tuned"})] == [*names, "tuned"]


# The average schedule


def played(program: Any, run: Any) -> list[list[RunSpec]]:
    waves, results = [], None
    try:
        while True:
            waves.append(next(program) if results is None else program.send(results))
            results = [run(spec) for spec in waves[-1]]
    except StopIteration:
        return waves


def closed_run(spec: RunSpec) -> RunResult:
    """Return a run of two intervals: the rate doubles on the first seed and halves twice on the second."""
    scale = {0: 2.0, 1: 0.25}[spec.config.seed]
    intervals = tuple(
        made_interval(spec.config, tokens=tokens, learning_rate_scale=scale**number, batch_size=8.0 * 2**number)
        for number, tokens in enumerate((6_400, 12_800))
    )
    return made_result(spec, intervals=intervals)


def test_open_loop_replays_the_average_of_the_closed_loops_on_every_case(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", decisions=2)
    cases = (CASE, replace(CASE, name="other", config=replace(CONFIG, base_learning_rate=5e-3)))
    [(closed, note)] = choose_methods(f"open-loop:{path}").open_loop
    ledger = made_ledger()
    waves = played(open_loop_program(ledger, cases, closed, note), closed_run)

    assert waves[0] == [closed.spec(case, seed) for case in cases for seed in (0, 1)]
    replayed = [spec for wave in waves[1:] for spec in wave]
    assert {spec.steering.kind for spec in replayed} == {"open-loop"}
    assert [spec.config for spec in replayed] == [spec.config for spec in waves[0]]
    first, second = replayed[0].steering.settings["schedule"]
    assert (first["share"], second["share"]) == (0.0, 0.5)
    assert (first["learning_rate_scale"], second["learning_rate_scale"]) == pytest.approx((1.0, 0.5**0.5))
    assert (first["batch_factor"], second["batch_factor"]) == pytest.approx((1.0, 2.0))
    assert [(row.case, row.method, row.seed) for row in ledger.rows] == [
        (case, f"open-loop:{path}", seed) for case in ("made", "other") for seed in (0, 1)
    ]
    assert not replayed[0].steering.probe  # nobody looks


def test_intervals_that_were_rolled_back_are_left_out_of_the_average(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", decisions=2)
    [(closed, note)] = choose_methods(f"open-loop:{path}").open_loop

    def run(spec: RunSpec) -> RunResult:
        result = closed_run(spec)
        undone = replace(result.intervals[1], learning_rate_scale=64.0, rolled_back=True)
        return replace(result, intervals=(result.intervals[0], undone, result.intervals[1]))

    schedules = [
        played(open_loop_program(made_ledger(), (CASE,), closed, note), each)[1][0].steering.settings
        for each in (run, closed_run)
    ]
    assert schedules[0] == schedules[1]


def test_runs_without_a_loss_are_left_out_of_the_average(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors", decisions=2)
    [(closed, note)] = choose_methods(f"open-loop:{path}").open_loop

    def run(spec: RunSpec) -> RunResult:
        result = closed_run(spec)
        return result if spec.config.seed == 0 else replace(result, final_validation_loss=None, diverged=True)

    waves = played(open_loop_program(made_ledger(), (CASE,), closed, note), run)
    _, second = waves[1][0].steering.settings["schedule"]
    assert second["learning_rate_scale"] == 2.0


def test_without_any_closed_loop_run_there_is_a_warning_and_no_rows(tmp_path: Path) -> None:
    path = bundle(tmp_path / "policy.safetensors")
    [(closed, note)] = choose_methods(f"open-loop:{path}").open_loop
    warnings: list[str] = []
    ledger = made_ledger(warnings=warnings)
    waves = played(open_loop_program(ledger, (CASE,), closed, note), lambda spec: made_result(spec, None))

    assert len(waves) == 1
    assert ledger.rows == ()
    assert warnings == [f"{note.name}: no closed-loop run ended with a finite loss; there is nothing to average"]


def test_an_unknown_kind_of_steering_and_too_few_workers_are_refused() -> None:
    from trainpilot.experiments.compare.execution import make_controller

    with pytest.raises(ValueError, match=r"steering must be one of keep, plateau, .*, got 'flying'"):
        make_controller(SteeringSpec(kind="flying"), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_workers(0, 1)
