"""A hook of mkdocs.yml: pages whose source lies outside of docs/, and links that work both in the repository and on the
site.

README.md is the first page, `formats/` stays where it is and is a part of the reference. A relative link is written as
the repository has it. On the site a link to a page leads to that page; a link to any other file leads to the
repository, or is plain text where `repo_url` is not set.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ALONE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def from_elsewhere() -> dict[str, str]:
    """Return, for each page whose source is outside of docs/, where the source is in the repository, and where the page
    is on the site."""
    formats = sorted((ROOT / "formats").rglob("*.md"))
    return {**ALONE, **{path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix() for path in formats}}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from elsewhere."""
    for source, page in from_elsewhere().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return the page with its links as the site needs them; code stays as it is."""
    sources = {site: source for source, site in from_elsewhere().items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")

    def rewritten(match: re.Match[str]) -> str:
        path, mark, heading = match["target"].partition("#")
        if "://" in path or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        site = from_elsewhere().get(place, place.removeprefix("docs/"))
        if site in files.src_uris:
            target = posixpath.relpath(site, posixpath.dirname(here) or ".")
        elif config.repo_url:
            target = f"{config.repo_url.rstrip('/')}/blob/main/{place}"
        else:
            return match["text"]
        return f"{match['image']}[{match['text']}]({target}{mark}{heading})"

    parts = _CODE.split(markdown)
    return "".join(part if n % 2 else _LINK.sub(rewritten, part) for n, part in enumerate(parts))
