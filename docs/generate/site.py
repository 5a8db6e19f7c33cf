"""Add README, CONTRIBUTING, CHANGELOG, the notebook and result files to the site, and adapt the links between them.

mkdocs calls the two functions below (`hooks` in mkdocs.yml). On disk a page under `docs/` links to `../benchmarks/...`
and the README to `docs/...`; in the site all of these lie below one root.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES["docs/examples/steer_a_loop.ipynb"] = "examples/steer_a_loop.md"
"""Pages that lie outside of `docs/` or are notebooks, and their names in the site."""
DATA = ("benchmarks/results/*.json", "experiments/compare/sets/*.yaml")
"""Data files that the pages link to; they are copied to the site."""

_LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^()#:\s]+)(?P<anchor>#[^()\s]*)?\)")
_ON_DISK = {site: disk for disk, site in PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie outside of `docs/`, and notebooks as pages."""
    for disk, site in PAGES.items():
        if disk.endswith(".ipynb"):
            files.append(File.generated(config, site, content=page_of(ROOT / disk)))
        else:
            files.append(File.generated(config, site, abs_src_path=str(ROOT / disk)))
    for path in sorted(path for pattern in DATA for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def page_of(notebook: Path) -> str:
    """Return a notebook as Markdown: its texts, its code, and the outputs that are kept in it."""
    parts: list[str] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if image := output.get("data", {}).get("image/png"):
                parts.append(f"![what the cell draws](data:image/png;base64,{''.join(''.join(image).split())})")
            else:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page to the locations of their targets in the site.

    A link to a file or folder that exists but is not part of the site becomes plain text. A broken link is not changed,
    so that a strict build reports it.
    """
    here = page.file.src_uri
    folder = PurePosixPath(_ON_DISK.get(here, f"docs/{here}")).parent

    def adapt(link: re.Match[str]) -> str:
        disk = os.path.normpath(folder / link["target"])
        site = PAGES.get(disk, disk.removeprefix("docs/"))
        if files.get_file_from_path(site) is not None:
            return f"[{link['text']}]({os.path.relpath(site, PurePosixPath(here).parent)}{link['anchor'] or ''})"
        return link["text"] if (ROOT / disk).exists() else link[0]

    return _LINK.sub(adapt, markdown)
