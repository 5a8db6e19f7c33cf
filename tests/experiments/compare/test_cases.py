"""Cases are read with every name checked; what is judged shares neither text nor model with what is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from trainpilot.experiments.compare.cases import load_cases, text_digests
from trainpilot.experiments.results import Case
from trainpilot.llm_runtime.data.corpus import ByteTokenizer, load_corpus
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.models import load_model

SETS = ("train", "test", "quick")
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


@pytest.mark.parametrize("judged", ["test", "quick"])
def test_training_cases_share_no_document_with_judged_ones(judged: str) -> None:
    for trained, held_out in product(_different(load_cases("train")), _different(load_cases(judged))):
        shared = text_digests(trained) & text_digests(held_out)
        assert not shared, f"{trained.config.text} and {held_out.config.text} share {len(shared)} documents"


@pytest.mark.parametrize("judged", ["test", "quick"])
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
        assert 50_000 < loaded.n_parameters < 400_000
        assert {key: rate for key, rate in drops.items() if rate and key not in unused} == {}


@pytest.mark.parametrize("name", SETS)
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
    common = {"tokens": 200_000, "text": "a.txt", "base_learning_rate": "3e-4"}
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
        ("cases: [{text: a.txt}]\n", "case 1: name must be made of a-z, 0-9, '.' and '-', got None"),
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
        ("cases: [{name: a, model: {model_type: llama, x: .nan}}]\n", "case a: model must hold plain JSON values: "),
        ("cases: [{name: a, model: {model_type: llama, x: 2024-01-01}}]\n", "case a: model must hold plain JSON"),
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
    with pytest.raises(ValueError, match=r"^cases must be one of quick, test, train or a YAML file, got 'nope'$"):
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
