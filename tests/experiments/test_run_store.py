"""A finished run is kept as one whole file, found again by what it is, and never trusted when it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from comparison_runs import CONFIG, made_result

from trainpilot.experiments.compare.cases import model_file
from trainpilot.experiments.compare.execute import failed
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key
from trainpilot.llm_runtime.config import RunConfig

SPEC = RunSpec(config=CONFIG)
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def kept(folder: Path) -> RunResult:
    """Return a result that is kept in `folder`."""
    result = made_result(SPEC)
    RunStore(folder).put(result)
    return result


def test_a_run_that_was_never_run_is_not_there(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")

    assert store.get("ab") is None
    assert not store.folder.exists()


def test_a_finished_run_is_one_whole_file_that_another_process_finds(tmp_path: Path) -> None:
    result = kept(tmp_path / "runs")

    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{result.key}.json"]
    assert RunStore(tmp_path / "runs").get(result.key) == result


def test_a_run_that_diverged_has_ended_and_is_not_run_again(tmp_path: Path) -> None:
    diverged = made_result(SPEC, None)
    RunStore(tmp_path).put(diverged)

    assert RunStore(tmp_path).get(diverged.key) == diverged


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"format": 1}', None])
def test_a_damaged_file_is_as_good_as_none_and_is_written_anew(tmp_path: Path, content: bytes | None) -> None:
    result = kept(tmp_path)
    path = tmp_path / f"{result.key}.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)

    store = RunStore(tmp_path)
    assert store.get(result.key) is None
    store.put(result)
    assert path.read_bytes() == whole


def test_a_run_of_another_version_is_run_again(tmp_path: Path) -> None:
    result = kept(tmp_path)
    path = tmp_path / f"{result.key}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))

    assert RunStore(tmp_path).get(result.key) is None


def test_a_file_under_another_runs_name_is_not_that_run(tmp_path: Path) -> None:
    result = kept(tmp_path)
    (tmp_path / f"{result.key}.json").rename(tmp_path / "other.json")

    assert RunStore(tmp_path).get("other") is None


def test_a_folder_in_the_way_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "ab.json").mkdir()

    assert RunStore(tmp_path).get("ab") is None


def test_a_failed_run_is_kept_for_the_report_but_tried_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    result = failed(SPEC, run_key(SPEC), "its process was killed")
    store.put(result)

    assert RunResult.from_json(json.loads((tmp_path / f"{result.key}.json").read_text())) == result
    assert store.get(result.key) is None
    assert RunStore(tmp_path).get(result.key) is None

    finished = made_result(SPEC)
    store.put(finished)
    assert RunStore(tmp_path).get(result.key) == finished


# Names


def case(folder: Path, text: str = "some text", model: str = "llama-nano") -> RunConfig:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text)
    return replace(CONFIG, text=(str(folder / "text.txt"),), model=model)


def test_text_counts_by_its_content(tmp_path: Path) -> None:
    here, there = case(tmp_path / "here"), case(tmp_path / "there")
    other = case(tmp_path / "other", "another text")

    assert run_key(RunSpec(config=here)) == run_key(RunSpec(config=there)) != run_key(RunSpec(config=other))


def test_a_model_written_in_the_cases_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for cache, model in (("here", LLAMA), ("there", LLAMA), ("there", LLAMA | {"hidden_size": 32})):
        monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / cache))
        keys.append(run_key(RunSpec(config=case(tmp_path / "text", model=str(model_file(model))))))

    assert keys[0] == keys[1] != keys[2]


def test_a_preset_counts_by_its_name(tmp_path: Path) -> None:
    keys = {run_key(RunSpec(config=case(tmp_path, model=model))) for model in ("llama-nano", "gpt2-nano")}

    assert len(keys) == 2


def test_text_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    spec = RunSpec(config=replace(CONFIG, text=(str(tmp_path / "nowhere.txt"),)))
    with pytest.raises(ValueError, match=r"nowhere\.txt") as caught:
        run_key(spec)

    assert "\n" not in str(caught.value)
