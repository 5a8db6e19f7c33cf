"""BPE tokenizers: merges by hand, the same ones every time, from the training split alone, and kept in the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live_runs import text_by_rule

from trainpilot.llm_runtime.data import bpe
from trainpilot.llm_runtime.data.bpe import END, trained_tokenizer
from trainpilot.llm_runtime.data.corpus import ByteTokenizer, PretrainedTokenizer, load_corpus
from trainpilot.llm_runtime.data.text_sources import DOCUMENT_END


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(text_by_rule(32_768), encoding="utf-8")
    return str(path)


def rules(tokenizer: PretrainedTokenizer) -> str:
    backend: Any = tokenizer.tokenizer
    text: str = backend.backend_tokenizer.to_str()
    return text


def test_merges_worked_out_by_hand() -> None:
    # Words: "ab" once, " ab" and " abc" twice each. Pairs: a b 5, then Ġ ab 4, then Ġab c 2; nothing else occurs twice.
    trained = json.loads(bpe._train("ab ab ab abc abc", 260).to_str())["model"]

    assert trained["merges"] == [["a", "b"], ["Ġ", "ab"], ["Ġab", "c"]]
    assert trained["vocab"][END] == 0
    assert sorted(trained["vocab"].values()) == list(range(260))  # the end, 256 bytes, three merges


def test_a_vocabulary_that_the_text_does_not_give() -> None:
    with pytest.raises(ValueError, match=r"^vocabulary must be at most 260 for this text, .*, got 261; lower it, or"):
        bpe._train("ab ab ab abc abc", 261)


def test_one_text_gives_one_tokenizer_whatever_the_threads(
    text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained_tokenizer([text_file], 300, cache=tmp_path / "first")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    second = trained_tokenizer([text_file], 300, cache=tmp_path / "second")
    kept = trained_tokenizer([text_file], 300, cache=tmp_path / "second")

    assert rules(first) == rules(second) == rules(kept)
    assert first.fingerprint == second.fingerprint == kept.fingerprint
    assert first.vocabulary == 300


def test_it_is_trained_on_the_training_split_alone(text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = bpe._train

    def watched(text: str, vocabulary: int) -> Any:
        seen.append(text)
        return train(text, vocabulary)

    monkeypatch.setattr(bpe, "_train", watched)
    trained_tokenizer([text_file], 300)

    splits = load_corpus([text_file], ByteTokenizer())
    assert seen == [splits.train.tobytes().decode()]
    assert len(splits.validation) > 0
    assert len(splits.test) > 0


def test_every_text_comes_back(text_file: str) -> None:
    tokenizer = trained_tokenizer([text_file], 300)
    text = f"the pilot\t  reads\n\n ünknown ❄ words, {END} and \x01"
    ids = tokenizer.encode(text + DOCUMENT_END + "the pilot")

    assert tokenizer.tokenizer.decode(ids[: list(ids).index(0)]) == text  # one 0 only: the document's end
    assert list(ids).count(0) == 1
    assert len(tokenizer.encode(text_by_rule(4_096))) < 4_096 / 2


def test_it_is_kept_under_text_and_size(text_file: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rules(trained_tokenizer([text_file], 300))
    trained_tokenizer([text_file], 290)
    Path(text_file).write_text(text_by_rule(40_000), encoding="utf-8")
    trained_tokenizer([text_file], 300)
    assert len(list(cache.iterdir())) == 3

    Path(text_file).write_text(text_by_rule(32_768), encoding="utf-8")
    monkeypatch.setattr(bpe, "_train", lambda *_: pytest.fail("trained again"))
    assert rules(trained_tokenizer([text_file], 300)) == before


def test_a_damaged_file_is_replaced(text_file: str, cache: Path) -> None:
    before = rules(trained_tokenizer([text_file], 300))
    (file,) = cache.iterdir()
    written = file.read_text(encoding="utf-8")
    for content in ("", before[: len(before) // 2], "{}", rules(trained_tokenizer([text_file], 290))):
        file.write_text(content, encoding="utf-8")
        assert rules(trained_tokenizer([text_file], 300)) == before
        assert file.read_text(encoding="utf-8") == written


def test_a_cache_that_cannot_be_written(text_file: str, tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("a file")

    assert trained_tokenizer([text_file], 300, cache=tmp_path / "in the way").vocabulary == 300


def test_a_text_too_short_to_split(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="text must hold at least 3 different blocks"):
        trained_tokenizer([str(tmp_path / "short.txt")], 300)
