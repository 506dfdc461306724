"""What `make docs` checks beyond mkdocs: a page of the site fetches nothing from elsewhere."""

from __future__ import annotations

import re

from mkdocs.exceptions import PluginError

FETCHES = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>|"""
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=["']?(?:https?:)?//[^>]*>""",
    re.IGNORECASE,
)


def on_post_page(output: str, page, **_: object) -> str:
    """Refuse a finished page that would load a script, picture, font or style from another host."""
    if found := FETCHES.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {found[0]}")
    return output
