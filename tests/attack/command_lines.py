"""Bad command lines: each must end with exit status 2, one line that says why, and nothing left behind."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.attack import furniture
from tests.attack.attempts import Attempt, Failures, Outcome, Promise, changes, content_of, control_characters, one_line
from tests.attack.forked import Called, trainpilot
from tests.attack.furniture import REPLAY, arguments, changed

TITLE = "bad command lines"
PROMISES = {
    "refused": Promise(
        "Invalid input at the command line ends with exit status 2 and one line that says why.",
        "options of the wrong type or outside of their range, missing, odd and contradictory files, options that "
        "contradict each other; half of them written by hand, half drawn by Hypothesis",
    ),
    "nothing left": Promise(
        "A command that is refused writes nothing.",
        "the folder is compared before and after each of these command lines",
    ),
    "terminal": Promise(
        "Nothing that a stranger wrote drives the terminal.",
        "control characters and marks of direction in options and in names of files",
    ),
}
LIMIT_S = 30.0

Options = dict[str, Any]
Value = TypeVar("Value")


def prepare(shared: Path) -> None:
    """Do nothing: every attempt furnishes its own folder."""


def drawn(strategy: st.SearchStrategy[Value], count: int, seed: int) -> list[Value]:
    """Return different values that a strategy draws, the same for the same seed."""
    found: dict[str, Value] = {}

    @seeded(seed)
    @settings(
        max_examples=10 * count, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(value: Value) -> None:
        if len(found) < count:
            found[repr(value)] = value

    collect()
    return list(found.values())


# Values that no option of a type accepts ------------------------------------------------------------------------------

_LETTERS = st.characters(exclude_categories=("Cs", "N"), exclude_characters="\0-")
_SPECIAL = ("none", "auto", "inf", "infinity", "nan")


def _words() -> st.SearchStrategy[str]:
    """Return texts that are no number, no option and no word with a meaning of its own."""
    return st.text(_LETTERS, max_size=12).filter(lambda text: text.strip().lower() not in _SPECIAL)


def _no_whole_number(least: int, *, huge: bool = True) -> st.SearchStrategy[str]:
    numbers = [
        st.integers(max_value=least - 1).map(str),
        st.floats(allow_nan=True, allow_infinity=True).map(repr).filter(lambda text: not text.endswith(".0")),
    ]
    if huge:
        numbers.append(st.integers(min_value=2**64, max_value=2**90).map(str))
    return st.one_of(_words(), *numbers)


def _no_positive() -> st.SearchStrategy[str]:
    return st.one_of(_words(), st.floats(max_value=0.0).map(repr), st.sampled_from(["nan", "inf", "-inf", "1e999"]))


def _no_share() -> st.SearchStrategy[str]:
    above = st.floats(min_value=1.0).map(repr)
    below = st.floats(max_value=-1e-9).map(repr)
    return st.one_of(_words(), above, below, st.just("nan"))


WRONG_REPLAY: dict[str, st.SearchStrategy[str]] = {
    "tokens": _no_whole_number(1, huge=False).filter(lambda text: "e+" not in text and "." not in text),
    "budget": _words(),
    "batch-size": _no_whole_number(1),
    "sequence-length": _no_whole_number(1),
    "base-learning-rate": _no_positive(),
    "decisions": _no_whole_number(1),
    "warmup-tokens": _no_whole_number(0),
    "warmup-share": _no_share(),
    "vocabulary": _no_whole_number(256),
    "seed": _no_whole_number(0),
    "threads": _no_whole_number(0),
    "schedule": _words(),
    "precision": _words(),
    "pruning": _words(),
    "pruning-importance": _words(),
    "teacher": _words(),
    "distillation-weight": _no_share(),
    "distillation-temperature": _no_positive(),
    "mode": _words(),
    "device": _words(),
    "policy": _words(),
    "preference": _words(),
    "model": _words(),
    "text": _words(),
    "grid-intensity": st.one_of(_words(), st.floats(max_value=-1e-9).map(repr), st.sampled_from(["nan", "inf"])),
}

Line = Sequence[str]


def _replay(seed: int) -> Iterator[Line]:
    for number, (name, strategy) in enumerate(WRONG_REPLAY.items()):
        for value in drawn(strategy, 4, seed + number):
            yield arguments("replay", changed(REPLAY, {"out": "out", name: value}))
    odd_options: list[Options] = [
        {"tokens": "2560", "budget": "10s"}, {"warmup-tokens": "10", "warmup-share": "0.1"},
        {"tokens": False, "budget": "10s", "warmup-tokens": "10"}, {"tokens": False, "budget": "0s"},
        {"tokens": False, "budget": "-5s"}, {"tokens": False, "budget": "10 parsecs"}, {"tokens": False, "budget": ""},
        {"tokens": False, "budget": "nan s"}, {"tokens": False, "budget": "1e999s"}, {"tokens": "10s"},
        {"tokens": False, "budget": "10s", "batch-size": "auto"}, {"tokens": "600"}, {"decisions": "41"},
        {"tokens": "2.5.6k"}, {"tokens": "1Q"}, {"tokens": "12x"}, {"batch-size": "4.0"}, {"batch-size": "0x4"},
        {"sequence-length": "100000"}, {"sequence-length": "65"}, {"vocabulary": "65537"}, {"vocabulary": "60000"},
        {"preference": "quality=1,quality=2"}, {"preference": "quality=-1"}, {"preference": "quality=nan"},
        {"preference": "quality=1e999"}, {"preference": "speed=1"}, {"preference": "quality"}, {"preference": ""},
        {"preference": "quality=0"}, {"preference": "quality=1;energy=1"}, {"preference": "=1"},
        {"policy": ""}, {"policy": "nosuch"}, {"policy": "./nosuch.safetensors"}, {"policy": "folder/"},
        {"policy": "folder"}, {"policy": "pickle.safetensors"}, {"policy": "zip.safetensors"}, {"policy": "./empty"},
        {"policy": "binary.safetensors"}, {"policy": "./dangling"}, {"policy": "./loop"}, {"policy": "./fifo"},
        {"policy": "./model.json"}, {"policy": "default\n"}, {"policy": "x" * 300 + ".safetensors"},
        {"mode": "advice"}, {"pruning": "all"}, {"precision": "fp8"}, {"schedule": "cosinus"}, {"precision": "fp16"},
        {"device": "cuda"}, {"device": "cuda:99"}, {"device": "meta"}, {"device": "tpu"}, {"device": ""},
        {"device": "cpu:1"}, {"device": "mps"},
        {"threads": "-1"}, {"threads": "1000000"}, {"seed": "-1"}, {"seed": str(2**64)}, {"seed": "1e3"},
        {"base-learning-rate": "1e-400"}, {"base-learning-rate": "0"}, {"warmup-share": "1"},
        {"warmup-tokens": "2560"}, {"out": ""}, {"out": "text.txt"}, {"out": "text.txt/below"},
        {"out": "/dev/null"}, {"out": "/dev/null/below"}, {"out": "/proc/below"}, {"out": "x" * 300},
        {"out": "dangling"}, {"out": "loop"}, {"out": "taken-run"}, {"out": "taken-words"}, {"out": "taken-list"},
        {"out": "fifo"}, {"out": False}, {"out": None}, {"nosuch": "1"}, {"batch_sise": "4"}, {"policy": None},
        {"vocabulary": "300", "model": "folder"}, {"grid-intensity": "-1"}, {"base-learning-rate": ("1e-3", "1e-4")},
    ]  # fmt: skip
    models = (
        "", " ", "nosuch", "typo/name", "a/b/c", "nosuch.json", "empty.json", "words.json", "list.json", "number.json",
        "deep.json", "twice.json", "control.json", "bert.json", "no_layers.json", "typo.json", "nan.json",
        "negative.json", "huge.json", "text_size.json", "unknown.json", "no_type.json", "code.json", "folder",
        "taken-run", "/dev/null", "fifo", "loop", "dangling", "text.txt", "x" * 300, "\x1b[2J", "..",
    )  # fmt: skip
    texts = (
        "", "nosuch.txt", "short.txt", "empty", "binary", "latin1.txt", "taken-empty*", "stdlib:nosuchmodule",
        "stdlib:", "hub:", "hub:nosuch", "hub:no/such", "/dev/null", "fifo", "loop", "dangling", "[", "**/nosuch",
        "python-doc", "x" * 300,
    )  # fmt: skip
    odd_options += [{"model": name} for name in models] + [{"text": name} for name in texts]
    odd_options += [{"text": ()}, {"text": ("text.txt", "nosuch.txt")}]
    for options in odd_options:
        yield arguments("replay", changed(REPLAY, {"out": "out", **options}))


BAD_SETTINGS: dict[str, Sequence[str]] = {
    "ppo.total_decisions": ("-1", "x", "1.5", "null", "[1]", "[1", "{}", "true", "1e999"),
    "n_envs": ("0", "-1", "x", "null"),
    "threads": ("0", "-1", "x", "1.5"),
    "utility": ("nosuch", "", "null", "[1]"),
    "reference_learning_rate": ("0", "-1", ".nan", ".inf", "x"),
    "cases": ("nosuch", "deep.yaml", "text.txt", "[1]"),
    "common.model": ("nosuch.json",),
    "common.text": ("[/nonexistent]",),
    "common.tokens": ("-1", "x"),
    "vary.seed": ("1", "x", "[-1]", "[x]"),
    "simulator": ("1", "[]", "x"),
    "simulator.n_runs": ("0", "-1", "x", "1.5", "null"),
    "simulator.instances": ("0", "-1", "x"),
    "simulator.seeds": ("0", "-1", "x"),
    "simulator.keep": ("99", "-1", "x"),
    "simulator.calibrations": ("[/nonexistent]", "[text.txt]", "[model.json]", "[folder]", "x", "7", "[]"),
    "simulator.start_rates": ("[1]", "[0, 1]", "[2, 1]", "[-1, 1]", "[.nan, 1]", "[1e-300, 1e300]", "x", "[]"),
    "simulator.start_advised": ("-1", "2", ".nan", "x"),
    "simulator.base_schedule.schedule": ("nosuch", "null", "[]"),
    "simulator.base_schedule.warmup_share": ("1", "-1", ".nan", "x"),
    "simulator.start_scale": ("0", "-1", "2", ".nan", "x"),
    "simulator.decisions": ("0", "-1", "x", "1.5"),
    "simulator.currencies": ("[x]", "[]", "x"),
    "simulator.least_quality": ("-1", "2", ".nan", "x"),
    "simulator.quality_alone": ("-1", "2", ".nan", "x"),
    "simulator.utility": ("nosuch", "null"),
    "simulator.observe": ("[nosuch]", "x"),
    "simulator.hide": ("[nosuch]", "x"),
    "simulator.stack": ("0", "-1", "99", "x"),
    "simulator.widening.spread": ("-1", ".nan", ".inf", "1e30", "x"),
    "simulator.ppo.total_decisions": ("-1", "x", "0"),
    "simulator.ppo.n_steps": ("0", "-1", "x"),
    "simulator.ppo.batch_size": ("0", "1", "-1", "x"),
    "simulator.ppo.n_epochs": ("0", "-1"),
    "simulator.ppo.learning_rate": ("0", "-1", ".nan", ".inf", "x"),
    "simulator.ppo.learning_rate_end": ("-1", "2", ".nan"),
    "simulator.ppo.gamma": ("-1", "2", ".nan", "x"),
    "simulator.ppo.gae_lambda": ("-1", "2", ".nan"),
    "simulator.ppo.clip_range": ("-1", "0", ".nan"),
    "simulator.ppo.ent_coef": (".nan", ".inf", "x"),
    "simulator.ppo.vf_coef": ("-1", ".nan"),
    "simulator.ppo.max_grad_norm": ("-1", "0", ".nan"),
    "simulator.ppo.hidden": ("[0]", "[-5]", "[1.5]", "x", "[[1]]", "7"),
    "simulator.ppo.keep_probability": ("0", "1", "-1", ".nan"),
    "simulator.ppo.finish_probability": ("0", "1", ".nan"),
    "simulator.ppo.time_limit_s": ("0", "-1", ".nan"),
    "simulator.ppo.seed": ("-1", "99999999999999999999", "x"),
    "simulator.validation.instances": ("0", "-1", "x"),
    "simulator.validation.every": ("0", "-1"),
    "simulator.nosuch": ("1",),
    "simulator.ppo.nosuch": ("1",),
    "nosuch": ("1",),
}


def _train_agent(seed: int) -> Iterator[Line]:
    base: Options = {"recipe": "recipe.yaml", "out": "out"}
    for key, values in BAD_SETTINGS.items():
        recipe = "recipe.yaml" if key.startswith("simulator") else "live.yaml"
        for value in values:
            yield arguments("train-agent", changed(base, {"recipe": recipe, "set": (f"{key}={value}",)}))
    keys = st.sampled_from(sorted(BAD_SETTINGS))
    for key, value in drawn(st.tuples(keys, _words()), 12, seed):
        if not key.endswith(("cases", "common.text", "common.model")):
            yield arguments("train-agent", changed(base, {"set": (f"{key}=no{value}",)}))
    odd = ("", "=", "x", "=1", ".=1", "ppo..seed=1", "ppo.seed.x=1", "ppo.seed", "a.b.c=1", "ppo=1", "ppo=", " =1",
           "ppo.seed=*a", "\x1b[2J=1", "ppo.seed={",
           'ppo.seed=!!python/object/apply:os.system ["touch PWNED"]')  # fmt: skip
    for text in odd:
        yield arguments("train-agent", changed(base, {"set": (text,)}))
    recipes = ("", "nosuch", "empty.yaml", "empty.json", "deep.yaml", "list.yaml", "anchor.yaml", "tag.yaml", "folder",
               "binary", "fifo", "loop", "text.txt", "model.json", "cases.yaml", "/dev/null", "x" * 300)  # fmt: skip
    for name in recipes:
        yield arguments("train-agent", changed(base, {"recipe": name}))
    for out in ("", "text.txt", "text.txt/below", "/dev/null/below", "/proc/below", "loop", "taken-agent", "x" * 300):
        yield arguments("train-agent", changed(base, {"out": out}))
    yield arguments("train-agent", {"recipe": "recipe.yaml"})
    yield arguments("train-agent", {"out": "out"})


def _compare(seed: int) -> Iterator[Line]:
    base: Options = {
        "cases": "cases.yaml",
        "out": "out",
        "methods": "cosine,constant",
        "seeds": "1",
        "jobs": "1",
        "plan": None,
    }
    for number, name in enumerate(("seeds", "threads", "jobs")):
        for value in drawn(_no_whole_number(0 if name == "jobs" else 1, huge=False), 4, seed + number):
            yield arguments("compare", changed(base, {name: value}))
    for value in drawn(_words(), 5, seed):
        yield arguments("compare", changed(base, {"methods": value}))
    methods = ("", ",", "cosine,", "cosine,,linear", "nosuch", "cosine,nosuch", "cosine,cosine", "policy:",
               "policy:nosuch", "policy:pickle.safetensors", "policy:binary.safetensors", "policy:folder",
               "policy:policy.safetensors@", "policy:policy.safetensors@nosuch", "policy:policy.safetensors@start=0",
               "policy:policy.safetensors@start=-1", "policy:policy.safetensors@start=nan",
               "policy:policy.safetensors@quality=-1", "policy:policy.safetensors@quality=x", "open-loop:",
               "open-loop:nosuch", "policy", ":", "@", "policy:default@unguarded@unguarded")  # fmt: skip
    for value in methods:
        yield arguments("compare", changed(base, {"methods": value}))
    cases = ("", "nosuch", "empty.yaml", "deep.yaml", "list.yaml", "anchor.yaml", "tag.yaml", "folder", "binary",
             "fifo", "loop", "recipe.yaml", "model.json", "deep.json", "text.txt", "x" * 300)  # fmt: skip
    for name in cases:
        yield arguments("compare", changed(base, {"cases": name}))
    for out in ("", "text.txt", "text.txt/below", "/dev/null/below", "/proc/below", "loop", "x" * 300):
        yield arguments("compare", changed(base, {"out": out}))
    yield arguments("compare", changed(base, {"seeds": "0"}))
    yield arguments("compare", changed(base, {"threads": "1000000"}))


def _calibrate(seed: int) -> Iterator[Line]:
    base: Options = {
        "model": "model.json", "text": "text.txt", "tokens": "256", "batch-size": "4", "sequence-length": "16",
        "decisions": "2", "effort": "quick", "jobs": "1", "device": "cpu", "out": "out",
    }  # fmt: skip
    wrong = {
        "tokens": _no_whole_number(1, huge=False), "batch-size": _no_whole_number(1), "decisions": _no_whole_number(1),
        "jobs": _no_whole_number(0, huge=False), "base-learning-rate": _no_positive(), "effort": _words(),
        "seed": _no_whole_number(0),
    }  # fmt: skip
    for number, (name, strategy) in enumerate(wrong.items()):
        for value in drawn(strategy, 3, seed + number):
            yield arguments("calibrate", changed(base, {name: value}))
    odd_options: list[Options] = [
        {"model": "no_layers.json"}, {"model": "bert.json"}, {"model": "deep.json"}, {"model": "nosuch"},
        {"text": "short.txt"}, {"text": "nosuch"}, {"tokens": "16"}, {"decisions": "100"}, {"out": "text.txt"},
        {"out": "/proc/below"}, {"out": "/dev/null/below"}, {"out": ""}, {"out": "loop"}, {"out": False},
        {"device": "meta"}, {"device": "cuda"}, {"base-learning-rate": "1e300"}, {"vocabulary": "1"},
        {"sequence-length": "1000"},
    ]  # fmt: skip
    for options in odd_options:
        yield arguments("calibrate", changed(base, options))


def _fit_sweep(seed: int) -> Iterator[Line]:
    base: Options = {"out": "out"}
    wrong = {
        "warmup-steps": _no_whole_number(0, huge=False), "initial-loss": _no_positive(), "schedule": _words(),
        "weight-decay": st.one_of(_words(), st.floats(max_value=-1e-9).map(repr), st.sampled_from(["nan", "inf"])),
        "end-learning-rate": st.one_of(_words(), st.floats(max_value=-1e-9).map(repr), st.sampled_from(["nan", "inf"])),
    }  # fmt: skip
    for number, (name, strategy) in enumerate(wrong.items()):
        for value in drawn(strategy, 3, seed + number):
            yield arguments("fit-sweep", changed(base, {name: value}), ("sweep.csv",))
    files = ("", "nosuch.csv", "empty.csv", "words.csv", "binary", "folder", "fifo", "loop", "model.json", "text.txt")
    for name in files:
        yield arguments("fit-sweep", base, (name,))
        yield arguments("fit-sweep", changed(base, {"predict": name}), ("sweep.csv",))
    for out in ("", "text.txt", "/proc/below", "/dev/null/below", "loop"):
        yield arguments("fit-sweep", {"out": out}, ("sweep.csv",))
    yield arguments("fit-sweep", base)


NO_MODELS = (
    "",
    "nosuch",
    "folder",
    "text.txt",
    "binary",
    "fifo",
    "loop",
    "taken-run",
    "taken-list",
    ".",
    "x" * 300,
)


def _cut(seed: int) -> Iterator[Line]:
    base: Options = {"out": "out", "ffn": "0.5"}
    for name in NO_MODELS:
        yield arguments("cut", base, (name,))
    for number, name in enumerate(("ffn", "heads", "depth")):
        for value in drawn(_no_share(), 3, seed + number):
            yield arguments("cut", changed(base, {name: value}), ("taken-run",))
    for value in drawn(_no_positive(), 3, seed):
        yield arguments("cut", changed(base, {"parameters": value}), ("taken-run",))
    for options in ({"ffn": False}, {"device": "tpu"}, {"out": "text.txt"}, {"out": "."}, {"out": "taken-other"},
                    {"threads": "-1"}, {"out": False}):  # fmt: skip
        yield arguments("cut", changed(base, options), ("taken-run",))


def _export(seed: int) -> Iterator[Line]:
    base: Options = {"out": "out"}
    for name in NO_MODELS:
        yield arguments("export", base, (name,))
    for value in drawn(_words(), 3, seed):
        yield arguments("export", changed(base, {"format": value}), ("taken-run",))
    for name, strategy in (("prompt-tokens", _no_whole_number(1)), ("new-tokens", _no_whole_number(1))):
        for value in drawn(strategy, 3, seed):
            yield arguments("export", changed(base, {name: value}), ("taken-run",))
    for options in ({"format": "int4,,int8"}, {"group-size": "33"}, {"device": "tpu"}, {"out": "text.txt"},
                    {"out": "."}, {"out": "taken-other"}, {"threads": "-1"}, {"out": False}):  # fmt: skip
        yield arguments("export", changed(base, options), ("taken-run",))


def _inspect(seed: int) -> Iterator[Line]:
    names = ["", "nosuch", "folder", "text.txt", "binary", "fifo", "loop", "dangling", "pickle.safetensors",
             "zip.safetensors", "binary.safetensors", "taken-run", "model.json", "/dev/null", "x" * 300, "\x1b[2J",
             "default\n"]  # fmt: skip
    names += [f"odd-run-{number}" for number in range(len(furniture.ODD_LINES))]
    names += drawn(_words().filter(lambda text: text.strip() not in {"", ".", "/", "..", "~"}), 6, seed)
    for name in names:
        yield ["inspect", name]
    yield ["inspect"]
    yield ["inspect", "a", "b"]


def _others(seed: int) -> Iterator[Line]:
    demo: list[Options] = [
        {"seed": "-1"}, {"seed": "x"}, {"seed": str(2**70)}, {"policy": "nosuch"}, {"policy": ""}, {"budget": "x"},
        {"budget": "-1s"}, {"budget": "10"}, {"budget": ""}, {"out": "text.txt"}, {"out": "/proc/below"},
        {"policy": "pickle.safetensors"}, {"budget": "1"}, {"nosuch": "1"},
    ]  # fmt: skip
    for options in demo:
        yield arguments("demo", {"out": "out", **options})
    yield from ([], [""], ["-"], ["--"], ["fly"], ["replay", "replay"], ["--nosuch"], ["Replay"], ["replay\n"],
                ["doctor", "x"], ["doctor", "--jsn"], ["doctor", "--json", "x"], ["\x1b[2J"], ["😀"],
                ["--out", "x"])  # fmt: skip
    for word in drawn(_words(), 10, seed):
        yield [word]


LISTS: tuple[Callable[[int], Iterator[Line]], ...] = (
    _replay, _train_agent, _compare, _calibrate, _fit_sweep, _cut, _export, _inspect, _others,
)  # fmt: skip


def attempts(seed: int, shared: Path) -> list[Attempt]:
    """Return one attempt for each bad command line."""
    lines = itertools.chain.from_iterable(lines(seed) for lines in LISTS)
    unique = {tuple(line): None for line in lines}
    return [
        Attempt(
            name=one_line("trainpilot " + shlex.join(line)),
            promises=("refused", "nothing left", "terminal"),
            run=partial(attack, line),
            limit_s=LIMIT_S,
        )
        for line in unique
    ]


def example(place: Path) -> Outcome:
    """Ask for a replay with a budget that is none."""
    return attack(["replay", "--out", "out", "--tokens", "x"], place)


def attack(line: Line, place: Path) -> Failures:
    """Carry out a bad command line in a furnished folder."""
    furniture.valid_files(place)
    furniture.odd_files(place)
    furniture.odd_run_folders(place)
    before = content_of(place)
    said = trainpilot(line, place.parent)
    failures = {}
    if reason := refused(said):
        failures["refused"] = reason
    if said.code and (left := changes(before, content_of(place))):
        failures["nothing left"] = left
    if printed := control_characters(said.out + said.err):
        failures["terminal"] = printed
    return failures


def refused(said: Called) -> str | None:
    """Return why what a command said is no refusal in one line; `None` where it is one."""
    if said.code == 0:
        return "accepted"
    if "Traceback (most recent call last)" in said.err:
        return f"a traceback: {one_line(said.lines[-1])}"
    if said.code != 2:
        return f"exit status {said.code}: {one_line(said.lines[-1] if said.lines else '')}"
    if len(said.lines) != 1 or not said.err.startswith("trainpilot: "):
        return f"{len(said.lines)} lines: {one_line(' / '.join(said.lines))}"
    return None
