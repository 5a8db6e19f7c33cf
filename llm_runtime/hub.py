"""Find out with one question whether the Hugging Face Hub can be reached.

Its client asks again and again for up to a minute, and prints a line each time, though what is not in its cache cannot
be had then anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

TIMEOUT_S = 10.0


@contextmanager
def asked_once(name: str, kind: Literal["model", "dataset"]) -> Iterator[None]:
    """Use the Hub's cache alone in a `with` block if the Hub does not answer a question about what is to be loaded."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _answers(name, kind)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _answers(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether the Hub answers, if only that there is no such thing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # the classes of its network package change with its versions
        return False
    return True
