"""Cases are read with every name checked; the settings and the model sizes that searches and sweeps may choose."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparison_runs import CONFIG
from transformers import AutoConfig

from trainpilot.experiments.compare.cases import (
    DEPTHS,
    LEARNING_RATE_STEP,
    RESPECTS,
    TUNED_SCHEDULES,
    WARMUP_SHARES,
    WIDTHS,
    StaticSetting,
    all_sizes,
    batch_near,
    can_vary,
    grid,
    load_cases,
    model_file,
    neighbours,
    rounded,
    text_digests,
    with_size,
)
from trainpilot.experiments.results import Case
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.bpe import trained_tokenizer
from trainpilot.llm_runtime.data.corpus import ByteTokenizer, load_corpus
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.models import PRESETS, body_parameters_of, load_model

SETS = ("train", "test", "quick", "large")
JUDGED = ("test", "quick", "large")
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

Write = Callable[[Any], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRAINPILOT_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a file of cases, from text or from values, and returns its path."""

    def write_file(content: Any) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write_file


# The shipped sets


def test_the_test_set_has_eight_cases_of_five_architectures() -> None:
    cases = load_cases("test")

    assert len(cases) == 8
    assert {case.architecture for case in cases} == {"llama", "gpt2", "gpt_neox", "qwen2", "opt"}
    assert {case.config.decisions for case in cases} == {50}
    assert {case.config.schedule for case in cases} == {"cosine"}
    assert {case.config.seed for case in cases} == {0}


def test_the_large_set_has_three_architectures_of_1_to_5_million_weights() -> None:
    cases = load_cases("large")

    assert {case.architecture for case in cases} >= {"gpt_neox", "gpt2", "llama"}
    for case in cases:
        n_parameters = body_parameters_of(case.config.model)
        assert n_parameters is not None
        assert 1_000_000 < n_parameters < 5_000_000
        assert 1024 <= case.config.vocabulary <= 4096
        assert case.config.tokens >= 3_000_000
    assert any("python-docs" in case.config.text for case in cases)


def test_the_large_set_reads_its_texts_a_few_times() -> None:
    for case in load_cases("large"):
        tokenizer = trained_tokenizer(case.config.text, case.config.vocabulary)
        epochs = case.config.tokens / len(load_corpus(case.config.text, tokenizer).train)
        assert 3 < epochs < 7


@pytest.mark.parametrize("judged", JUDGED)
def test_training_cases_share_no_document_with_judged_ones(judged: str) -> None:
    for trained, held_out in product(_different(load_cases("train")), _different(load_cases(judged))):
        shared = text_digests(trained) & text_digests(held_out)
        assert not shared, f"{trained.config.text} and {held_out.config.text} share {len(shared)} documents"


@pytest.mark.parametrize("judged", JUDGED)
def test_training_cases_share_no_model_with_judged_ones(judged: str) -> None:
    assert not _model_configs("train") & _model_configs(judged)


def test_the_quick_set_reads_what_the_test_set_reads() -> None:
    assert {case.config.text for case in load_cases("quick")} <= {case.config.text for case in load_cases("test")}


@pytest.mark.parametrize("name", SETS)
def test_every_field_of_a_written_config_is_one_that_its_architecture_has(name: str) -> None:
    for case in load_cases(name):
        if case.config.model.endswith(".json"):
            content = json.loads(Path(case.config.model).read_text(encoding="utf-8"))
            known = AutoConfig.for_model(content["model_type"])
            assert [field for field in content if not hasattr(known, field)] == []


@pytest.mark.parametrize("name", SETS)
def test_models_are_small_and_drop_nothing_out(name: str) -> None:
    for case in load_cases(name):
        loaded = load_model(case.config.model, seed=0)
        config = loaded.model.config.to_dict()
        drops = {key: rate for key, rate in config.items() if "drop" in key or key.endswith("pdrop")}
        unused = {"summary_first_dropout", "classifier_dropout"}  # of heads that a language model does not have
        assert 50_000 < loaded.n_parameters < (400_000 if name != "large" else 5_000_000)
        assert {key: rate for key, rate in drops.items() if rate and key not in unused} == {}


@pytest.mark.parametrize("name", ["train", "test", "quick"])
def test_a_run_sees_its_text_at_most_once(name: str) -> None:
    for case in _different(load_cases(name)):
        assert len(load_corpus(case.config.text, ByteTokenizer()).train) >= case.config.tokens


def _different(cases: tuple[Case, ...]) -> list[Case]:
    """Return one case for each text."""
    return list({case.config.text: case for case in cases}.values())


def _model_configs(name: str) -> set[str]:
    models = {case.config.model for case in load_cases(name)}
    return {json.dumps(load_model(model, seed=0).model.config.to_dict(), sort_keys=True) for model in models}


# Files of one's own


def test_a_case_takes_common_fields_unless_it_has_its_own(write: Write) -> None:
    common = {"tokens": 200_000, "text": "a.txt", "base_learning_rate": "3e-4", "vocabulary": 2048}
    cases = [{"name": "first"}, {"name": "second.2", "text": ["b.txt", "c"], "tokens": 300_000, "target_loss": 2.5}]
    first, second = load_cases(write({"common": common, "cases": cases}))

    assert (first.name, first.config.tokens, first.config.text, first.target_loss) == (
        "first",
        200_000,
        ("a.txt",),
        None,
    )
    assert (second.name, second.config.tokens, second.config.text) == ("second.2", 300_000, ("b.txt", "c"))
    assert second.target_loss == 2.5
    assert first.config.vocabulary == second.config.vocabulary == 2048
    assert second.config.base_learning_rate == pytest.approx(3e-4)


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{\t"cases": [{"name": "a", "base_learning_rate": 3e-4}]}')

    assert load_cases(str(path))[0].config.base_learning_rate == pytest.approx(3e-4)


def test_a_config_in_place_becomes_a_file_named_by_its_content(write: Write, cache: Path) -> None:
    turned = dict(reversed(LLAMA.items()))
    wider = LLAMA | {"hidden_size": 64}
    cases = [{"name": name, "model": model} for name, model in zip("abc", (LLAMA, turned, wider), strict=True)]
    first, same, other = load_cases(write(yaml.safe_dump({"cases": cases}, sort_keys=False)))

    assert first.config.model == same.config.model != other.config.model
    assert Path(first.config.model).parent == cache / "models"
    assert json.loads(Path(first.config.model).read_text()) == LLAMA
    assert first.architecture == "llama"
    assert load_model(first.config.model, seed=0).model.config.hidden_size == 32


def test_a_config_in_place_has_one_digest_wherever_the_cache_is(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    file = write({"cases": [{"name": "a", "model": LLAMA, "text": str(tmp_path / "a.txt")}]})
    here = load_cases(file)[0].config
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "elsewhere"))
    there = load_cases(file)[0].config

    assert here.model != there.model
    assert content_digest(here) == content_digest(there)


def test_the_architecture_is_looked_up_where_the_model_is_on_this_machine(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "opt"}')
    models = {"gpt2-nano": "gpt2", str(folder): "opt", str(folder / "config.json"): "opt", "owner/name": "unknown"}
    cases = load_cases(write({"cases": [{"name": f"m{i}", "model": model} for i, model in enumerate(models)]}))

    assert [case.architecture for case in cases] == list(models.values())
    assert [case.config.model for case in cases] == list(models)


# Faults


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold names and values, got list"),
        ("a: [\n", "is not readable YAML: while parsing"),
        ("day: 2024-02-31\n", "is not readable YAML: day is out of range"),
        ("{}", "cases must list at least one case, got none; a case looks like"),
        ("cases: []\n", "cases must list at least one case, got none"),
        ("cases: yes\n", "cases: Input should be a valid list, got True"),
        ("cases: [llama]\n", "cases.0: Input should be a valid dictionary, got 'llama'"),
        ("colour: red\n", "'colour' is unknown; known are common, cases"),
        ("common: {tokns: 5}\ncases: [{name: a}]\n", "common: 'tokns' is unknown; known are model, text"),
        ("common: {seed: 5}\ncases: [{name: a}]\n", "common: seed is set by the comparison, got 5; leave it out"),
        ("cases: [{text: a.txt}]\n", "case 1: name must be made of at most 64 of a-z, 0-9, '.' and '-', got None"),
        ("cases: [{name: a}, {name: 3}]\n", "case 2: name must be made of .*, got 3"),
        ("cases: [{name: ../a}]\n", "case 1: name must be made of .*, got '../a'"),
        ("cases: [{name: ..}]\n", r"case 1: name must be made of .*, got '\.\.'"),
        ("cases: [{name: a}, {name: b}, {name: b}]\n", "case b: name must be its own, got it 2 times"),
        ("cases: [{name: a, tokns: 5}]\n", "case a: 'tokns' is unknown; known are model, text"),
        ("cases: [{name: a, seed: 1}]\n", "case a: seed is set by the comparison, got 1; leave it out, use --seeds"),
        ("cases: [{name: a, tokens: many}]\n", "case a: tokens: .*got 'many'"),
        ("common: {tokens: -5}\ncases: [{name: a}]\n", "case a: tokens must be a whole number of at least 1, got -5"),
        ("cases: [{name: a, target_loss: low}]\n", "case a: target_loss: .*got 'low'"),
        ("cases: [{name: a, target_loss: 0}]\n", "case a: target_loss must be a positive number of nats/token, got 0"),
        ("cases: [{name: a, target_loss: .nan}]\n", "case a: target_loss must be a positive number .*, got nan"),
        ("cases: [{name: a, model: 7}]\n", "case a: model: Input should be a valid string, got 7"),
        ("cases: [{name: a, model: {hidden_size: 8}}]\n", "case a: model must have a model_type .*, got None"),
        (
            "cases: [{name: a, model: {model_type: llama, x: .nan}}]\n",
            "case a: model must hold plain JSON values: ",
        ),
        ("cases: [{name: a, model: {model_type: llama, x: 2024-01-01}}]\n", "it holds a date, which is no plain value"),
        ("cases: [{name: a, model: no/such.json}]\n", "case a: model must be a readable config, got no/such.json"),
    ],
)
def test_a_fault_is_one_line_that_names_file_case_and_field(write: Write, content: str, message: str) -> None:
    file = write(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_cases(file)

    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


def test_no_such_set() -> None:
    with pytest.raises(
        ValueError, match=r"^cases must be one of large, quick, test, train or a YAML file, got 'nope'$"
    ):
        load_cases("nope")


def test_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not readable JSON: Expecting property name"):
        load_cases(str(path))


def test_a_model_folder_with_a_broken_config(write: Write, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    file = write({"cases": [{"name": "a", "model": str(tmp_path)}]})
    with pytest.raises(ValueError, match="case a: model must have a model_type"):
        load_cases(file)


def test_a_cache_that_cannot_be_written(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "file"))
    file = write({"cases": [{"name": "a", "model": LLAMA}]})
    with pytest.raises(ValueError, match=r"case a: model cannot be written to .*set TRAINPILOT_CACHE"):
        load_cases(file)


# Static settings: the grid, the neighbours, the run of a setting ----------------------------------------------------


SETTING = StaticSetting(learning_rate=1e-2, batch_size=8, schedule="linear", warmup_share=0.1, precision="fp32")


# The grid


def test_the_grid_leans_upwards_from_the_cases_own_rate() -> None:
    settings = grid(CONFIG, ["fp32"])

    assert len(settings) == len(set(settings)) == 5 * 3 * 3
    assert {setting.learning_rate for setting in settings} == {3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2}
    assert {setting.batch_size for setting in settings} == {4, 8, 16}
    assert {setting.schedule for setting in settings} == set(TUNED_SCHEDULES)
    assert {setting.warmup_share for setting in settings} == {0.1}


def test_every_precision_that_pays_is_in_the_grid() -> None:
    settings = grid(CONFIG, ["fp32", "bf16"])

    assert Counter(setting.precision for setting in settings) == {"fp32": 45, "bf16": 45}


@pytest.mark.parametrize(("batch_size", "batches"), [(1, {1, 2}), (2, {1, 2, 4}), (3, {3, 6}), (40, {20, 40})])
def test_batches_of_the_grid_are_whole_and_leave_sixteen_steps(batch_size: int, batches: set[int]) -> None:
    config = replace(CONFIG, batch_size=batch_size, decisions=5)

    assert {setting.batch_size for setting in grid(config, ["fp32"])} == batches


def test_a_budget_of_a_few_steps_has_no_grid() -> None:
    assert grid(replace(CONFIG, tokens=15 * 16, batch_size=1, decisions=1), ["fp32"]) == []


def test_a_batch_leaves_sixteen_steps() -> None:
    assert batch_near(50, CONFIG) == 50  # 50 x 16 tokens x 16 steps = 12,800
    assert batch_near(51, CONFIG) is None
    assert batch_near(1, CONFIG) == 1
    assert batch_near(0.5, CONFIG) is None
    assert batch_near(1.5, CONFIG) is None


def test_rates_are_rounded_to_three_digits() -> None:
    assert rounded(0.0123456) == 0.0123
    assert rounded(1e-3 * math.sqrt(10) * math.sqrt(10)) == 1e-2


# Neighbours


def test_neighbours_differ_by_one_step_in_one_respect() -> None:
    found = neighbours(SETTING, LEARNING_RATE_STEP, CONFIG)

    assert found == [
        replace(SETTING, learning_rate=3.16e-2),
        replace(SETTING, learning_rate=3.16e-3),
        replace(SETTING, batch_size=4),
        replace(SETTING, batch_size=16),
        replace(SETTING, warmup_share=0.05),
        replace(SETTING, warmup_share=0.2),
        replace(SETTING, schedule="cosine"),
        replace(SETTING, schedule="wsd"),
    ]


@pytest.mark.parametrize("respect", RESPECTS)
def test_neighbours_in_one_respect_differ_in_nothing_else(respect: str) -> None:
    found = neighbours(SETTING, 2.0, CONFIG, [respect])

    assert len(found) == 2
    assert all(replace(one, **{respect: getattr(SETTING, respect)}) == SETTING != one for one in found)


def test_neighbours_at_the_ends() -> None:
    smallest = replace(SETTING, batch_size=1, warmup_share=WARMUP_SHARES[0])
    largest = replace(SETTING, batch_size=32, warmup_share=WARMUP_SHARES[-1])

    assert neighbours(smallest, 2.0, CONFIG, ["batch_size"]) == [replace(smallest, batch_size=2)]
    assert neighbours(largest, 2.0, CONFIG, ["batch_size"]) == [replace(largest, batch_size=16)]
    assert neighbours(smallest, 2.0, CONFIG, ["warmup_share"]) == [replace(smallest, warmup_share=0.05)]
    assert neighbours(largest, 2.0, CONFIG, ["warmup_share"]) == [replace(largest, warmup_share=0.2)]


def test_a_schedule_that_is_not_tuned_has_the_tuned_ones_for_neighbours() -> None:
    constant = replace(SETTING, schedule="constant")

    assert [one.schedule for one in neighbours(constant, 2.0, CONFIG, ["schedule"])] == list(TUNED_SCHEDULES)


# Runs


def test_a_setting_on_the_whole_budget() -> None:
    config = replace(SETTING, batch_size=4, precision="bf16").on(CONFIG, seed=7)

    assert config == replace(
        CONFIG, base_learning_rate=1e-2, batch_size=4, schedule="linear", precision="bf16", warmup_tokens=1_280, seed=7
    )


@pytest.mark.parametrize(
    ("budget", "batch_size", "tokens", "decisions", "warmup_tokens"),
    [
        (0.25, 8, 3_200, 3, 320),  # 2.5 decisions, rounded up
        (1.25, 8, 16_000, 10, 1_600),
        (4.0, 8, 51_200, 10, 5_120),
        (0.125, 32, 1_600, 2, 160),  # 1,600 tokens hold three steps of 512
        (0.01, 8, 128, 1, 13),  # one step at least
        (0.01, 32, 512, 1, 51),
    ],
)
def test_a_setting_on_another_budget(
    budget: float, batch_size: int, tokens: int, decisions: int, warmup_tokens: int
) -> None:
    config = replace(SETTING, batch_size=batch_size).on(CONFIG, budget=budget, seed=0)

    assert (config.tokens, config.decisions, config.warmup_tokens) == (tokens, decisions, warmup_tokens)


def test_warm_up_leaves_something_of_the_run() -> None:
    config = replace(SETTING, batch_size=1, warmup_share=1.0).on(CONFIG, seed=0)

    assert config.warmup_tokens == CONFIG.tokens - 1


# Other sizes of a model ---------------------------------------------------------------------------------------------


GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 64}


def of(model: dict[str, Any]) -> RunConfig:
    return replace(CONFIG, model=str(model_file(model)))


def content(config: RunConfig) -> dict[str, Any]:
    return json.loads(Path(config.model).read_text()) if config.model not in PRESETS else PRESETS[config.model]


def test_sizes_worked_out_by_hand() -> None:
    # llama-nano: hidden 64, feed-forward 192, 3 layers, 4 heads, so sizes are multiples of 8.
    config = replace(CONFIG, model="llama-nano")

    assert with_size(config, 1, 0) is config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for width, depth, expected in (
        (0.5, -1, (32, 96, 2, 4, 4)),
        (1.5, 1, (96, 288, 4, 4, 4)),
        (1.0, 1, (64, 192, 4, 4, 4)),
    ):
        changed = content(with_size(config, width, depth))
        assert tuple(changed[name] for name in sizes) == expected


def test_widths_are_rounded_to_twice_the_heads_and_layers_end_at_one() -> None:
    # 48 x 1.5 = 72 = 9 x 8; 40 x 0.5 = 20 -> 2.5 x 8, rounded to the even 16; 8 x 0.5 -> not below 8.
    assert content(with_size(of(GPT2), 1.5, 0))["n_embd"] == 72
    assert content(with_size(of(GPT2 | {"n_embd": 40}), 0.5, 0))["n_embd"] == 16
    assert content(with_size(of(GPT2 | {"n_embd": 8}), 0.5, 0))["n_embd"] == 8
    assert content(with_size(of(GPT2), 1.0, -1))["n_layer"] == 1


def test_only_the_model_changes() -> None:
    config = of(GPT2)
    changed = with_size(config, 0.5, 1)

    assert replace(changed, model=config.model) == config
    assert content_digest(changed) != content_digest(config)
    assert with_size(config, 0.5, 1) == changed


def test_all_sizes_begin_with_the_cases_own_and_hold_each_once() -> None:
    config = replace(CONFIG, model="gpt2-nano")
    sizes = all_sizes(config)

    assert sizes[0] == config
    assert len(sizes) == len(set(sizes)) == len(WIDTHS) * len(DEPTHS)
    assert len(all_sizes(of(GPT2))) == 6  # one layer less than one is one


@pytest.mark.parametrize("model", ["owner/name", "some/folder"])
def test_a_model_that_is_not_trained_from_scratch_keeps_its_size(model: str) -> None:
    config = replace(CONFIG, model=model)

    assert not can_vary(config)
    assert all_sizes(config) == (config,)
    with pytest.raises(ValueError, match="width and depth are free only for models trained from scratch"):
        with_size(config, 0.5, 0)


def test_a_model_that_does_not_say_how_many_heads_it_has_keeps_its_size() -> None:
    config = of({"model_type": "llama", "hidden_size": 48})

    assert not can_vary(config)
    assert all_sizes(config) == (config,)


@pytest.mark.parametrize("case", load_cases("test"), ids=lambda case: case.name)
def test_every_size_of_the_test_models_can_be_trained(case: Any) -> None:
    parameters = {}
    for width in WIDTHS:
        for depth in DEPTHS:
            sized = with_size(case.config, width, depth)
            model = load_model(sized.model, seed=0)
            parameters[width, depth] = model.n_parameters
            assert model.model.config.hidden_size % model.model.config.num_attention_heads == 0

    for depth in DEPTHS:
        assert parameters[0.5, depth] < parameters[1.0, depth] < parameters[1.5, depth]
    for width in WIDTHS:
        assert parameters[width, -1] < parameters[width, 0] < parameters[width, 1]
