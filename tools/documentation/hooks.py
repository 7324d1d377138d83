"""Hooks of mkdocs: pages of docs/ are written for a checkout, and become pages of a site.

Links to files outside docs/ lead to ``repo_url``; without one the text stays, and the file's path is given behind it.
Headings get the anchors that GitHub gives them, so that one link is right in both places.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

__all__ = ["github_anchor", "on_config", "on_page_markdown", "outside_links"]

_FENCED = re.compile(r"(?ms)^ *```.*?^ *```$")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|`[^`]*`)*)\]\(([^)\s]+)\)")


def github_anchor(heading: str, separator: str = "-") -> str:
    """The anchor that GitHub gives to a heading's text."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def outside_links(markdown: str, page: str, repository: str) -> str:
    """The page, its links out of docs/ as links to the repository, or as the path where there is none.

    ``page``: path below docs/. Code is left as it is.
    """

    def mended(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
        if place.startswith("docs/"):
            return match[0]
        if repository:
            return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{place}{'#' * bool(anchor)}{anchor})"
        return text if text.strip("`").rstrip("/") == place else f"{text} (`{place}`)"

    parts, at = [], 0
    for code in _FENCED.finditer(markdown):
        parts += [_LINK.sub(mended, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, _LINK.sub(mended, markdown[at:])])


def on_config(config: Any) -> Any:
    """Give headings GitHub's anchors."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Mend the links of a page before it is rendered."""
    return outside_links(markdown, page.file.src_uri, config.repo_url or "")
