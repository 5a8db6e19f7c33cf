"""Ask the Hugging Face Hub once whether it can be reached.

Its client asks again and again for up to a minute, and prints a line each time; what is not in its cache cannot be had
then anyway.
"""

from __future__ import annotations

from typing import Literal

TIMEOUT_S = 10.0


def hub_answers(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether the Hub answers a question about a model or a data set, if only that there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # the classes of its network package change with its versions
        return False
    return True
