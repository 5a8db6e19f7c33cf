"""Train a byte-level BPE tokenizer on the training split of a text, and keep it in the cache.

Validation and test text have no part in it. The same text and size give the same tokenizer, on every machine and with
any number of threads: merges are chosen by how often a pair occurs, ties by the ids of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainpilot.llm_runtime import files
from trainpilot.llm_runtime.data.corpus import PIECE, PretrainedTokenizer, SplitText
from trainpilot.llm_runtime.data.text_sources import DOCUMENT_END

FORMAT = "1"
"""Part of the cache's key: raise it when the rules of the tokenizer change."""
END = "<|endoftext|>"
"""Token between two documents, id 0."""
LEAST_OCCURRENCES = 2
"""A pair of tokens becomes a token if it occurs this often."""


def trained_tokenizer(sources: Sequence[str], vocabulary: int, *, cache: Path | None = None) -> PretrainedTokenizer:
    """Return a tokenizer of `vocabulary` ids: the end of a document, the 256 bytes, and merges as in GPT-2.

    Args:
        sources: What `text_sources.read_documents` reads. Only the split that is trained on counts.
        vocabulary: Number of ids, at least 257.
        cache: Folder of trained tokenizers; `files.cache_dir() / "tokenizers"` if not given.

    Raises:
        ValueError: a source cannot be read, or the text is too short to split or for that many ids.
    """
    from transformers import PreTrainedTokenizerFast

    text = SplitText.read([sources] if isinstance(sources, str) else sources).of("train")
    key = files.digest([FORMAT, vocabulary, files.digest(text, 16)], 16)
    path = (cache or files.cache_dir() / "tokenizers") / f"{key}.json"
    rules = _kept(path, vocabulary)
    if rules is None:
        rules = _train(text, vocabulary)
        with suppress(OSError), files.whole_file(path) as temporary:  # a cache that cannot be written only costs time
            temporary.write_text(rules.to_str(), encoding="utf-8")
    return PretrainedTokenizer(
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=rules, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
        )
    )


def _train(text: str, vocabulary: int) -> Tokenizer:
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=LEAST_OCCURRENCES,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator((piece for piece in PIECE.findall(text) if piece != DOCUMENT_END), trainer)
    if (found := rules.get_vocab_size()) < vocabulary:
        raise ValueError(
            f"vocabulary must be at most {found} for this text, as no further pair of tokens occurs "
            f"{LEAST_OCCURRENCES} times in its training split, got {vocabulary}; lower it, or add text with --text"
        )
    return rules


def _kept(path: Path, vocabulary: int) -> Tokenizer | None:
    """Return the tokenizer in a file; `None` if there is none or it is damaged."""
    try:
        rules = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception:  # the library raises plain `Exception` for a file that is not a tokenizer
        return None
    return rules if rules.get_vocab_size() == vocabulary else None
