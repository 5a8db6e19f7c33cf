"""Turn text into token ids, and token ids into batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.llm_runtime.data.batches import BatchStream, fixed_batch
    from trainpilot.llm_runtime.data.corpus import ByteTokenizer, Corpus, PretrainedTokenizer, Tokenizer, load_corpus
    from trainpilot.llm_runtime.data.text_sources import read_documents

__all__ = [
    "BatchStream",
    "ByteTokenizer",
    "Corpus",
    "PretrainedTokenizer",
    "Tokenizer",
    "fixed_batch",
    "load_corpus",
    "read_documents",
]

_NAMES = {
    "batches": ["BatchStream", "fixed_batch"],
    "corpus": ["ByteTokenizer", "Corpus", "PretrainedTokenizer", "Tokenizer", "load_corpus"],
    "text_sources": ["read_documents"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)
