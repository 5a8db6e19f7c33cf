"""Turn text into token ids: tokenizers, splits that depend on content alone, and a memory-mapped cache.

Where text comes from is in `text_sources`, how ids become batches in `batches`.
"""

from __future__ import annotations

import errno
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from trainpilot.llm_runtime import files
from trainpilot.llm_runtime.data.text_sources import DOCUMENT_END, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = npt.NDArray[Any]
"""Token ids, one-dimensional: uint8, uint16 or uint32, the smallest which holds the vocabulary."""

SPLITS = ("train", "validation", "test")
HELD_OUT = 20
"""One of this many blocks goes to validation and one to test, rounded up to whole blocks."""
BLOCK_CHARACTERS = (1024, 32 * 1024)
"""Smallest and largest block of text that goes into one split as a whole, in characters."""
CACHE_FORMAT = "1"
"""Part of the cache's key: raise it when the splits, blocks or files of the cache change."""

# What a pretrained tokenizer gets at once: pieces that end with a line, where a line ends nearby.
PIECE = re.compile(r"\0|[^\0]{1,32768}\n|[^\0]{1,32768}")
PIECES_PER_CALL, PIECES_WITHOUT_BAR = 64, 128


class Tokenizer(Protocol):
    """Anything that turns text into ids below `vocabulary`."""

    @property
    def fingerprint(self) -> str:
        """Text that is equal for two tokenizers exactly if they return equal ids."""

    @property
    def vocabulary(self) -> int:
        """Number of different ids."""

    def encode(self, text: str) -> Tokens:
        """Return the ids of `text`, shape `(tokens,)`; `DOCUMENT_END` stands between two documents."""

    def save(self, folder: Path) -> None:
        """Write files from which `AutoTokenizer.from_pretrained(folder)` makes a tokenizer with the same ids."""


class ByteTokenizer:
    """One id per byte of UTF-8, for models that start from scratch; a document's end is id 0."""

    fingerprint = "bytes"
    vocabulary = 256
    document_end = 0

    def encode(self, text: str) -> Tokens:
        """Return the bytes of `text` as uint8, shape `(bytes,)`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def save(self, folder: Path) -> None:
        """Write it as a byte-level BPE without merges, which transformers loads without code of ours.

        It has no special tokens: those would be found in a text, where every byte has its meaning already.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        rules = Tokenizer(models.BPE({character: byte for byte, character in enumerate(byte_characters())}, []))
        rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rules.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=rules, clean_up_tokenization_spaces=False
        ).save_pretrained(folder)

    @staticmethod
    def lies_in(folder: Path) -> bool:
        """Return whether the tokenizer in a folder is one that `save` wrote."""
        try:
            rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            model, added = rules["model"], rules["added_tokens"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        of_bytes = {character: byte for byte, character in enumerate(byte_characters())}
        return not added and model.get("vocab") == of_bytes and model.get("merges") == []


def byte_characters() -> list[str]:
    """Return GPT-2's printable character for every byte, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


class PretrainedTokenizer:
    """A tokenizer of transformers: that of a model's folder or Hub id, or one that `bpe` trained.

    Special tokens are neither added nor read from the text; the end-of-sequence id, if there is one, goes
    between documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._end: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        vocabulary = tokenizer.get_vocab()
        self.vocabulary: int = 1 + max(vocabulary.values())
        self.fingerprint: str = _fingerprint(tokenizer, vocabulary)

    def encode(self, text: str) -> Tokens:
        """Return the ids of `text` as uint32, shape `(tokens,)`; a long text shows a progress bar."""
        from rich.console import Console
        from rich.progress import track

        pieces = PIECE.findall(text)
        calls = [pieces[i : i + PIECES_PER_CALL] for i in range(0, len(pieces), PIECES_PER_CALL)]
        short = len(pieces) < PIECES_WITHOUT_BAR
        bar = track(calls, "text to tokens", disable=short, transient=True, console=Console(stderr=True))
        return np.concatenate([np.zeros(0, np.uint32), *map(self._encode_pieces, bar)])

    def save(self, folder: Path) -> None:
        """Write it as transformers does."""
        self.tokenizer.save_pretrained(folder)

    def _encode_pieces(self, pieces: list[str]) -> npt.NDArray[np.uint32]:
        ids = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)
        rows = zip(pieces, ids["input_ids"], strict=True)
        parts = (self._end if piece == DOCUMENT_END else row for piece, row in rows)
        return np.fromiter(chain.from_iterable(parts), dtype=np.uint32)


def _fingerprint(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> str:
    """Return a hash of a fast tokenizer's rules, or of the class and vocabulary of another tokenizer."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(fast.to_str()) if fast is not None else {"vocabulary": vocabulary}
    rules.update(truncation=None, padding=None, kind=type(tokenizer).__name__, end=tokenizer.eos_token_id)
    return files.digest(rules, 16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Token ids of one or several texts, split three ways; memory maps, if the cache can be written."""

    name: str
    """The sources, as they were given."""
    train: Tokens
    """Ids to train on, shape `(tokens,)`."""
    validation: Tokens
    """Ids that a policy may be evaluated on during a run, shape `(tokens,)`."""
    test: Tokens
    """Ids for the final evaluation only, shape `(tokens,)`."""
    vocabulary: int
    """Number of different ids the tokenizer may give."""
    key: str
    """Hash of the content and of the tokenizer."""
    n_bytes: int
    """Size of the whole text as UTF-8, in bytes."""
    n_test_bytes: int
    """The same of the text that went into `test`."""

    @property
    def bytes_per_token(self) -> float:
        """Mean length of a token over the whole text, in bytes."""
        return self.n_bytes / (len(self.train) + len(self.validation) + len(self.test))

    def test_bits_per_byte(self, loss: float) -> float:
        """Return a loss on the test split in bits/byte, which compares models with different tokenizers.

        Args:
            loss: In nats/token.
        """
        return loss / math.log(2) * len(self.test) / self.n_test_bytes


def load_corpus(sources: Sequence[str], tokenizer: Tokenizer, *, cache: Path | None = None) -> Corpus:
    """Read, split and tokenise `sources`, or take the ids from the cache if content and tokenizer are known.

    The text is cut into blocks; which split a block goes to depends on the text alone. The blocks of a split
    keep their order and follow each other directly.

    Args:
        sources: what `text_sources.read_documents` reads.
        tokenizer: gives the ids.
        cache: folder of token caches; `files.cache_dir() / "tokens"` if not given.

    Raises:
        ValueError: a source cannot be read, or the text is too short to split.
    """
    named = [sources] if isinstance(sources, str) else list(sources)
    text = SplitText.read(named)
    key = files.digest("\n".join([CACHE_FORMAT, tokenizer.fingerprint, *text.digests]), 16)
    folder = (cache or files.cache_dir() / "tokens") / key
    dtype = np.min_scalar_type(tokenizer.vocabulary - 1)
    tokens = _read_cache(folder, dtype) or _build(folder, dtype, text, tokenizer)
    return Corpus(
        name=", ".join(named),
        **tokens,
        vocabulary=tokenizer.vocabulary,
        key=key,
        n_bytes=sum(map(text.n_bytes, SPLITS)),
        n_test_bytes=text.n_bytes("test"),
    )


# Splits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitText:
    """A text as blocks, each of which belongs to one split."""

    blocks: tuple[str, ...]
    digests: tuple[str, ...]
    """Of the blocks as UTF-8."""
    names: tuple[str, ...]
    """The split of each block."""

    @classmethod
    def read(cls, sources: Sequence[str]) -> SplitText:
        """Read and split `sources`. Raises `ValueError` if one cannot be read or the text is too short to split."""
        blocks = _blocks(DOCUMENT_END.join(read_documents(sources)))
        digests = [files.digest(block.encode("utf-8"), 16) for block in blocks]
        return cls(tuple(blocks), tuple(digests), tuple(split_blocks(digests)))

    def of(self, split: str) -> str:
        """Return the text of a split; `DOCUMENT_END` stands between two documents."""
        return "".join(block for block, name in zip(self.blocks, self.names, strict=True) if name == split)

    def n_bytes(self, split: str) -> int:
        """Return the size of a split as UTF-8, in bytes."""
        return len(self.of(split).encode("utf-8"))


def _blocks(text: str) -> list[str]:
    """Cut `text` into 64 blocks, as far as `BLOCK_CHARACTERS` allows; the last takes the remainder too."""
    size = int(np.clip(len(text) // 64, *BLOCK_CHARACTERS))
    starts = [size * i for i in range(max(len(text) // size, 1))]
    return [text[i:j] for i, j in zip_longest(starts, starts[1:])]


def split_blocks(digests: Sequence[str]) -> list[str]:
    """Name the split of every block from the hashes of all blocks.

    Different blocks are ranked by hash, those that occur once first: 5 % go to validation, the next 5 % to
    test (both rounded up), the rest to train. Equal blocks share a split, and text that repeats itself is
    trained on rather than held out.

    Raises:
        ValueError: there are fewer than three different blocks.
    """
    counts = Counter(digests)
    if len(counts) < len(SPLITS):
        raise ValueError(
            f"text must hold at least {len(SPLITS)} different blocks of {BLOCK_CHARACTERS[0]} characters "
            f"to be split, got {len(counts)}; add more text with --text"
        )
    ranked = sorted(counts, key=lambda digest: (counts[digest], digest))
    n = math.ceil(len(ranked) / HELD_OUT)
    held_out = dict.fromkeys(ranked[:n], "validation") | dict.fromkeys(ranked[n : 2 * n], "test")
    return [held_out.get(digest, "train") for digest in digests]


# Cache ------------------------------------------------------------------------------------------------------


def _build(folder: Path, dtype: np.dtype[Any], text: SplitText, tokenizer: Tokenizer) -> dict[str, Tokens]:
    """Tokenise the splits and write them to the cache; if that fails they stay in memory."""
    tokens: dict[str, Tokens] = {split: tokenizer.encode(text.of(split)).astype(dtype) for split in SPLITS}
    if (cached := _read_cache(folder, dtype)) is not None:  # another process was faster
        return cached
    try:
        with files.whole_folder(folder) as temporary:
            for split in SPLITS:
                (temporary / f"{split}.ids").write_bytes(tokens[split].data)
            files.write_json(temporary / "meta.json", {split: files.digest(tokens[split].data, 16) for split in SPLITS})
    except OSError as error:
        # Two processes that write the same ids at the same time collide, which is harmless.
        if error.errno not in (None, errno.ENOENT, errno.ENOTEMPTY):
            warnings.warn(f"token cache not written ({error}); the ids stay in memory", stacklevel=3)
    return _read_cache(folder, dtype) or tokens


def _read_cache(folder: Path, dtype: np.dtype[Any]) -> dict[str, Tokens] | None:
    """Map the splits from `folder`; None if they are not there or not as they were written.

    They are plain ids without a header: NumPy parses its own with `ast`, which Python 3.11 cannot do in several
    threads at once (https://github.com/python/cpython/issues/106905).
    """
    try:
        checksums = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens: dict[str, Tokens] = {split: np.memmap(folder / f"{split}.ids", dtype, "r") for split in SPLITS}
        intact = all(files.digest(tokens[split].data, 16) == checksums[split] for split in SPLITS)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return tokens if intact else None
