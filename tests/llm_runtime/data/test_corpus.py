import errno
import json
import os
import string
import sys
import sysconfig
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from trainpilot.llm_runtime import files
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data import corpus as corpus_module
from trainpilot.llm_runtime.data import text_sources
from trainpilot.llm_runtime.data.corpus import (
    SPLITS,
    ByteTokenizer,
    Corpus,
    PretrainedTokenizer,
    load_corpus,
    split_blocks,
)
from trainpilot.llm_runtime.data.text_sources import DOCUMENT_END, content_digest, read_documents

JSON = ["json/__init__.py", "json/tool.py"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRAINPILOT_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    return path


def some_text(n_characters, seed=0):
    letters = np.array(list(string.ascii_lowercase + " \n"))
    return "".join(np.random.default_rng(seed).choice(letters, n_characters))


@pytest.fixture
def text_file(folder):
    path = folder / "text.txt"
    path.write_text(some_text(100_000))
    return path


def as_text(tokens):
    return tokens.tobytes().decode()


class WideTokenizer(ByteTokenizer):
    """Bytes under another name and with a larger vocabulary; counts its calls."""

    def __init__(self, vocabulary=300, fingerprint="wide"):
        self.vocabulary, self.fingerprint, self.calls = vocabulary, fingerprint, 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


# Splits


def test_splits_by_rank_of_hash():
    # Five different blocks, ceil(5 / 20) = 1 each: the smallest hash validates, the next one tests.
    assert split_blocks(["e", "b", "d", "a", "c"]) == ["train", "test", "train", "validation", "train"]


def test_repeated_blocks_share_a_split_and_are_trained_on():
    # "a" is the smallest hash, but it occurs twice: "b" and "c" come first.
    assert split_blocks(["a", "b", "a", "c"]) == ["train", "validation", "train", "test"]
    assert split_blocks(["a", "b", "a", "b", "c"]) == [
        "validation" if d == "c" else "test" if d == "a" else "train" for d in "ababc"
    ]


@pytest.mark.parametrize(("n", "held_out"), [(3, 1), (20, 1), (21, 2), (40, 2), (140, 7), (141, 8)])
def test_held_out_blocks_are_five_percent_rounded_up(n, held_out):
    names = split_blocks([f"{i:03}" for i in range(n)])
    assert [names.count(split) for split in SPLITS] == [n - 2 * held_out, held_out, held_out]


def test_splits_hold_every_character_once(text_file):
    corpus = load_corpus([str(text_file)], ByteTokenizer())
    # 100,000 // 64 = 1562 characters per block, 64 blocks, the last 32 longer; ceil(64 / 20) = 4.
    sizes = [len(corpus.train), len(corpus.validation), len(corpus.test)]
    assert sum(sizes) == 100_000
    assert sizes[1] in (4 * 1562, 4 * 1562 + 32)
    assert sizes[2] in (4 * 1562, 4 * 1562 + 32)
    text = text_file.read_text()
    blocks = [text[i : i + 1562] for i in range(0, 63 * 1562, 1562)]
    homes = [[split for split in SPLITS if block in as_text(getattr(corpus, split))] for block in blocks]
    assert all(len(home) == 1 for home in homes)


def test_blocks_keep_their_order(text_file):
    corpus = load_corpus([str(text_file)], ByteTokenizer())
    text, train = text_file.read_text(), as_text(corpus.train)
    places = [text.index(train[i : i + 200]) for i in range(0, len(train) - 200, 1562)]
    assert places == sorted(places)


def test_splits_do_not_depend_on_name_or_place(text_file, tmp_path):
    copy = tmp_path / "elsewhere.md"
    copy.write_bytes(text_file.read_bytes())
    first, second = (load_corpus([str(path)], ByteTokenizer()) for path in (text_file, copy))
    assert first.key == second.key
    assert all(np.array_equal(getattr(first, split), getattr(second, split)) for split in SPLITS)


def test_text_of_three_blocks_is_enough_and_less_is_not(folder):
    path = folder / "short.txt"
    path.write_text(some_text(3 * 1024))
    corpus = load_corpus([str(path)], ByteTokenizer())
    assert [len(getattr(corpus, split)) for split in SPLITS] == [1024, 1024, 1024]
    path.write_text(some_text(3 * 1024 - 1))
    with pytest.raises(ValueError, match=r"at least 3 different blocks of 1024 .* got 2; add more"):
        load_corpus([str(path)], ByteTokenizer())


def test_text_that_only_repeats_itself_is_refused(folder):
    (folder / "same.txt").write_text("x" * 64 * 2048)
    with pytest.raises(ValueError, match="3 different blocks"):
        load_corpus([str(folder)], ByteTokenizer())


# Tokens


def test_bytes_make_a_round_trip(folder):
    text = "Grüße, 世界 🚀\r\n\ttab " * 3000
    (folder / "a.txt").write_bytes(text.encode())
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint8
    assert as_text(ids) == text
    corpus = load_corpus([str(folder / "a.txt")], ByteTokenizer())
    assert corpus.n_bytes == len(text.encode())
    assert sorted(b"".join(getattr(corpus, split).tobytes() for split in SPLITS)) == sorted(text.encode())
    assert corpus.bytes_per_token == 1


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (151_936, np.uint32)],
)
def test_ids_take_the_smallest_type(text_file, vocabulary, dtype):
    corpus = load_corpus([str(text_file)], WideTokenizer(vocabulary))
    assert {getattr(corpus, split).dtype for split in SPLITS} == {np.dtype(dtype)}
    assert corpus.vocabulary == vocabulary


@pytest.fixture(scope="module")
def letters():
    """A real fast tokenizer of 'transformers' with one id per byte and an end-of-sequence token, id 256."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def build(**special):
        return PreTrainedTokenizerFast(tokenizer_object=rules, **special)

    return build


def test_pretrained_tokenizer_puts_the_end_between_documents(letters):
    tokenizer = PretrainedTokenizer(letters(eos_token="<|end|>"))
    assert tokenizer.vocabulary == 257
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert tokenizer.encode(f"ab{DOCUMENT_END}b").tolist() == [a, b, 256, b]
    assert tokenizer.encode("").tolist() == []


def test_pretrained_tokenizer_without_an_end_puts_nothing(letters):
    tokenizer = PretrainedTokenizer(letters())
    assert len(tokenizer.encode(f"ab{DOCUMENT_END}b")) == 3


def test_special_tokens_in_the_text_are_plain_text(letters):
    ids = PretrainedTokenizer(letters(eos_token="<|end|>")).encode("a<|end|>b")
    assert len(ids) == len("a<|end|>b")
    assert 256 not in ids


def test_pretrained_tokenizer_encodes_piece_by_piece(letters, monkeypatch, capsys):
    tokenizer = PretrainedTokenizer(letters(eos_token="<|end|>"))
    text = DOCUMENT_END.join([some_text(70_000), "x" * 70_000, "end\n"])
    whole = [i for part in text.split(DOCUMENT_END) for i in (*tokenizer.encode(part), 256)][:-1]
    assert tokenizer.encode(text).tolist() == whole
    monkeypatch.setattr(corpus_module, "PIECES_PER_CALL", 1)
    monkeypatch.setattr(corpus_module, "PIECES_WITHOUT_BAR", 0)
    assert tokenizer.encode(text).tolist() == whole
    assert capsys.readouterr().out == ""


def test_fingerprint_tells_tokenizers_apart(letters):
    first, same = (PretrainedTokenizer(letters(eos_token="<|end|>")) for _ in range(2))
    other = PretrainedTokenizer(letters(eos_token="<|stop|>"))
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, PretrainedTokenizer(letters()).fingerprint}) == 3


def test_fingerprint_ignores_padding_and_truncation(letters):
    tokenizer = letters(eos_token="<|end|>")
    before = PretrainedTokenizer(tokenizer).fingerprint
    tokenizer(["abc"], truncation=True, max_length=2)
    assert PretrainedTokenizer(tokenizer).fingerprint == before


def test_pretrained_corpus_is_cached(letters, text_file, cache):
    corpus = load_corpus([str(text_file)], PretrainedTokenizer(letters(eos_token="<|end|>")))
    assert corpus.train.dtype == np.uint16
    assert corpus.bytes_per_token == 1
    assert (cache / "tokens" / corpus.key / "train.ids").is_file()


# Cache


def test_cache_is_a_read_only_map_and_is_reused(text_file, cache):
    tokenizer = WideTokenizer()
    first = load_corpus([str(text_file)], tokenizer)
    second = load_corpus([str(text_file)], tokenizer)
    assert tokenizer.calls == 3
    assert first.key == second.key
    assert [path.name for path in (cache / "tokens").iterdir()] == [first.key]
    for split in SPLITS:
        tokens = getattr(second, split)
        assert isinstance(tokens, np.memmap)
        assert not tokens.flags.writeable
        assert np.array_equal(tokens, getattr(first, split))


def test_cache_may_lie_anywhere(text_file, tmp_path, cache):
    corpus = load_corpus([str(text_file)], ByteTokenizer(), cache=tmp_path / "other")
    assert (tmp_path / "other" / corpus.key / "meta.json").is_file()
    assert not cache.exists()


def test_key_changes_with_content_and_tokenizer(text_file):
    def key(tokenizer):
        return load_corpus([str(text_file)], tokenizer).key

    before, other_tokenizer = key(ByteTokenizer()), key(WideTokenizer())
    text_file.write_text(text_file.read_text().replace("a", "b", 1))
    assert len({before, other_tokenizer, key(ByteTokenizer())}) == 3


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.ids", flip_a_byte),
        ("train.ids", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("test.ids", lambda path: path.write_bytes(b"")),
        ("validation.ids", lambda path: path.write_bytes(b"no array")),
        ("validation.ids", Path.unlink),
        ("meta.json", Path.unlink),
        ("meta.json", lambda path: path.write_text("{")),
        ("meta.json", lambda path: path.write_text("[]")),
        ("meta.json", lambda path: path.write_text("{}")),
    ],
)
def test_damaged_cache_is_rebuilt(text_file, cache, name, damage):
    tokenizer = WideTokenizer()
    first = load_corpus([str(text_file)], tokenizer)
    expected = np.array(first.train)
    del first
    (folder,) = (cache / "tokens").iterdir()
    damage(folder / name)
    second = load_corpus([str(text_file)], tokenizer)
    assert tokenizer.calls == 6
    assert isinstance(second.train, np.memmap)
    assert np.array_equal(second.train, expected)
    assert set(json.loads((folder / "meta.json").read_text())) == set(SPLITS)


def test_full_disk_warns_once_and_keeps_the_ids_in_memory(text_file, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"cache not written .*No space left.* in memory") as caught:
        corpus = load_corpus([str(text_file)], ByteTokenizer())
    assert len(caught) == 1
    assert not isinstance(corpus.train, np.memmap)
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 100_000
    assert list((cache / "tokens").iterdir()) == []


def test_ids_of_a_faster_writer_are_taken_over(text_file, cache, monkeypatch):
    expected = load_corpus([str(text_file)], ByteTokenizer())
    (folder,) = (cache / "tokens").iterdir()
    away = folder.rename(cache / "away")

    def loses_the_race(path):
        away.rename(path)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(files, "whole_folder", loses_the_race)
    with warnings.catch_warnings(action="error"):
        corpus = load_corpus([str(text_file)], ByteTokenizer())
    assert isinstance(corpus.train, np.memmap)
    assert np.array_equal(corpus.train, expected.train)


def test_many_writers_at_once(text_file):
    results: list[Corpus] = []

    def load():
        for _ in range(5):
            results.append(load_corpus([str(text_file)], ByteTokenizer()))

    threads = [threading.Thread(target=load) for _ in range(8)]
    with warnings.catch_warnings(action="error"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 40
    assert all(np.array_equal(corpus.train, results[0].train) for corpus in results)


def test_the_cache_needs_no_parser_of_python_which_threads_cannot_share(text_file, monkeypatch):
    load_corpus([str(text_file)], ByteTokenizer())

    def parse(*_, **__):
        raise SystemError("AST constructor recursion depth mismatch (before=36, after=35)")

    monkeypatch.setattr("ast.parse", parse)
    assert isinstance(load_corpus([str(text_file)], ByteTokenizer()).train, np.memmap)


# Sources


def test_standard_library_is_a_real_corpus():
    corpus = load_corpus(["stdlib"], ByteTokenizer())
    assert corpus.name == "stdlib"
    assert corpus.n_bytes > 1_000_000
    assert 0.85 < len(corpus.train) / corpus.n_bytes < 0.95
    assert min(len(corpus.validation), len(corpus.test)) > 0.04 * corpus.n_bytes
    names = {path.name for path in text_sources._standard_library()}
    assert {"argparse.py", "json.py"} & names == {"argparse.py"}
    assert not any({"test", "site-packages"} & set(path.parts) for path in text_sources._standard_library())


@pytest.fixture
def library(folder, monkeypatch):
    """A small standard library: each file holds its own path."""
    names = [
        "ast.py",
        "json/__init__.py",
        "json/tool.py",
        "json/tests/test_json.py",
        "jsonlike.py",
        "logging/config.py",
    ]
    for name in [*names, "pydoc_data/topics.py", "site-packages/numpy/__init__.py", "json/data.bin", "LICENSE.txt"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(folder)}.__getitem__)
    return folder


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("stdlib", ["ast.py", *JSON, "jsonlike.py", "logging/config.py", "pydoc_data/topics.py"]),
        ("stdlib:json", JSON),
        ("stdlib:json,logging", [*JSON, "logging/config.py"]),
        ("stdlib:logging, json,js*n", [*JSON, "logging/config.py"]),
        ("stdlib:json*", [*JSON, "jsonlike.py"]),
        ("stdlib:ast", ["ast.py"]),
        ("stdlib:ast.py", ["ast.py"]),
        ("stdlib:*.py", ["ast.py", "jsonlike.py"]),
        ("stdlib:*", ["ast.py", *JSON, "jsonlike.py", "logging/config.py"]),
    ],
)
def test_part_of_the_standard_library(library, source, files):
    assert read_documents([source]) == files


@pytest.mark.parametrize("pattern", ["jso", "pydoc_data", "site-packages", "LICENSE*", "JSON", "json/tool.py", ""])
def test_pattern_that_matches_nothing_in_the_standard_library(library, pattern):
    source = f"stdlib:ast,{pattern}"
    assert message_of([source]) == (
        f"text {source!r} must name packages or modules of the standard library, got {pattern!r}, which is none; "
        "for example --text stdlib:asyncio,json, or stdlib:*.py for all single-file modules"
    )


def test_python_docs_are_prose():
    documents = read_documents(["python-docs"])
    assert any(document.startswith('The "while" statement') for document in documents)
    assert 300_000 < sum(map(len, documents)) < 3_000_000
    assert not set(documents) & set(read_documents(["stdlib:*"]))


def test_python_docs_are_a_document_per_topic_in_order(monkeypatch):
    module = types.SimpleNamespace(topics={"b": "two", "a": "o\0ne", "c": ""})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    assert read_documents(["python-docs"]) == ["o ne", "two"]


def test_python_docs_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert message_of(["python-docs"]) == (
        "text 'python-docs' needs the interpreter's module pydoc_data.topics, got none; "
        "install Python's full standard library, or use --text stdlib"
    )


def test_one_source_may_be_given_as_plain_text(text_file):
    assert load_corpus(str(text_file), ByteTokenizer()).name == str(text_file)


def test_folder_is_read_recursively_sorted_without_hidden_files(folder):
    (folder / "b").mkdir()
    (folder / ".git").mkdir()
    for name in ("b/1.txt", "a.txt", "c.md", ".hidden", ".git/config"):
        (folder / name).write_text(name)
    assert read_documents([str(folder)]) == ["a.txt", "b/1.txt", "c.md"]


def test_glob_takes_files_at_any_depth(folder):
    (folder / "b").mkdir()
    for name in ("b/1.txt", "a.txt", "c.md"):
        (folder / name).write_text(name)
    assert read_documents([f"{folder}/*.txt"]) == ["a.txt"]
    assert read_documents([f"{folder}/**/*.txt"]) == ["a.txt", "b/1.txt"]
    assert read_documents([f"{folder}/*"]) == ["a.txt", "c.md"]


def test_file_with_a_glob_in_its_name_is_that_file(folder):
    (folder / "a[1].txt").write_text("one")
    (folder / "a1.txt").write_text("other")
    assert read_documents([f"{folder}/a[1].txt"]) == ["one"]


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "a.txt").write_text("at home")
    assert read_documents(["~/a.txt"]) == ["at home"]


def test_documents_keep_the_order_of_sources_and_occur_once(folder):
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("copy.txt", "one"), ("empty.txt", " \n")):
        (folder / name).write_text(text)
    assert read_documents([f"{folder}/b.txt", str(folder)]) == ["two", "one"]


def test_documents_are_joined_by_the_document_end(folder):
    for name in "ab":
        (folder / name).write_text(some_text(3000, seed=ord(name)))
    corpus = load_corpus([str(folder)], ByteTokenizer())
    assert sum((np.asarray(getattr(corpus, split)) == 0).sum() for split in SPLITS) == 1
    assert corpus.n_bytes == 6001


def test_other_files_in_a_folder_are_counted_and_left_out(folder):
    (folder / "a.txt").write_text("text")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "zeros.bin").write_bytes(b"ab\0cd")
    with pytest.warns(UserWarning, match="left out 3 of 4 files, not UTF-8 text"):
        assert read_documents([str(folder)]) == ["text"]


# Fingerprints


def test_fingerprint_of_a_config_is_its_content(text_file, tmp_path):
    paths = [tmp_path / "here" / "a.json", tmp_path / "there" / "b.json", tmp_path / "other.json"]
    for path, content in zip(paths, ("{}", "{}", "{ }"), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    os.utime(paths[0], (0, 0))
    configs = [RunConfig(text=(str(text_file),), model=str(path)) for path in paths]
    same, moved, changed = map(content_digest, configs)
    assert same == moved != changed
    text_file.write_text(some_text(100_000, seed=1))
    assert content_digest(configs[0]) != same


def test_fingerprint_of_a_folder_changes_with_its_files(text_file, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = RunConfig(text=(str(text_file),), model=str(model))
    digests = [content_digest(config)]
    for size in (1, 2):
        (model / "model.safetensors").write_bytes(b"x" * size)
        digests.append(content_digest(config))
    assert len(set(digests)) == 3
    assert content_digest(config) == digests[-1]


# Errors


def message_of(sources):
    with pytest.raises(ValueError) as caught:
        load_corpus(sources, ByteTokenizer())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("source", ["no/such/file.txt", "", "pipe\0", "stdlib2"])
def test_missing_path(source):
    assert message_of([source]) == (
        f"text must be an existing file, folder or glob, 'stdlib', 'python-docs' or 'hub:OWNER/NAME', got {source!r}; "
        "check the path, or use --text stdlib"
    )


def test_no_source():
    assert message_of([]) == "text must not be empty, got no source; add another source with --text"


def test_empty_corpus(folder):
    (folder / "a.txt").write_text(" \n")
    path = f"{folder}/a.txt"
    assert message_of([path]) == f"text must not be empty, got {path}; add another source with --text"


def test_file_in_another_encoding(folder):
    path = folder / "latin.txt"
    path.write_bytes("Grüße".encode("latin-1"))
    assert message_of([str(path)]) == (
        f"text must be UTF-8, got '{path}' with another byte at position 2; "
        "convert it, for example with: iconv -t utf-8"
    )


def test_file_with_zeros(folder):
    path = folder / "wide.txt"
    path.write_bytes("plain".encode("utf-16-le"))
    expected = f"text must be UTF-8 text, got '{path}' with NUL bytes; convert it, or leave it out"
    assert message_of([str(path)]) == expected


def test_unreadable_file(text_file, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert message_of([str(text_file)]) == (
        f"text must be readable, got '{text_file}' (Permission denied); check its permissions"
    )


def test_folder_and_glob_without_text(folder):
    way_out = "check the path, or use --text stdlib"
    start = "text must hold at least one UTF-8 file, got"
    assert message_of([str(folder)]) == f"{start} '{folder}' (no file); {way_out}"
    assert message_of([f"{folder}/*.txt"]) == f"{start} '{folder}/*.txt' (no file); {way_out}"
    for name in "ab":
        (folder / name).write_bytes(b"\xff\xfe")
    expected = f"{start} '{folder}' (2 files, none of them UTF-8 text); {way_out}"
    assert message_of([str(folder)]) == expected


# The Hub


class Rows:
    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, name):
        return self.columns[name]


@pytest.fixture
def hub(monkeypatch):
    """Put a data set package in place whose `load_dataset` is `answer`; returns the calls it got."""

    def install(answer):
        calls = []

        def load_dataset(*names, split):
            calls.append((*names, split))
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:owner/name:test", ("owner/name", None, "test")),
        ("hub:owner/name/config-1:train[:1%]", ("owner/name", "config-1", "train[:1%]")),
    ],
)
def test_hub_rows_are_documents(hub, source, call):
    calls = hub(Rows(id=[1, 2, 3, 4], text=["one", "two", None, "o\0ne"]))
    assert read_documents([source]) == [DOCUMENT_END.join(["one", "two", "o ne"])]
    assert calls == [call]


def test_hub_column_may_be_called_content(hub):
    hub(Rows(content=["one"]))
    assert read_documents(["hub:owner/name"]) == ["one"]


def test_hub_without_a_text_column(hub):
    hub(Rows(question=["why"], answer=["so"]))
    assert message_of(["hub:owner/name"]) == (
        "text 'hub:owner/name' must have a column text or content, got question, answer; "
        "save the column you want as a text file and use --text FILE"
    )


def test_hub_offline(hub):
    hub(ConnectionError("Couldn't reach the Hub\nlong explanation"))
    assert message_of(["hub:owner/name"]) == (
        "text 'hub:owner/name' is not reachable: ConnectionError: Couldn't reach the Hub; "
        "check name, configuration, split, access and network, or use --text FILE"
    )


def test_hub_out_of_reach_leaves_the_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(time, "sleep", None)  # the Hub's client waits between two tries
    hub(lambda: Rows(text=["cached" if constants.HF_HUB_OFFLINE else "tried"]))
    assert read_documents(["hub:owner/name"]) == ["cached"]
    assert constants.HF_HUB_OFFLINE is False


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message_of(["hub:owner/name"]) == (
        "text 'hub:owner/name' needs the package datasets, got no such package; "
        'run: pip install "trainpilot[hub]", or use --text FILE'
    )


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:owner/", "hub:a/b/c/d", "hub:a b/c"])
def test_hub_source_in_another_form(source):
    assert message_of([source]).startswith(
        f"text from the Hub must read hub:OWNER/NAME[/CONFIGURATION][:SPLIT], got {source!r}; for example"
    )
