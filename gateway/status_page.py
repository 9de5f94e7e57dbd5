"""The status page: one HTML file of this package, and what a browser may do for it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE_FILE = "status_page.html"


class StatusPage:
    """The page as it is sent. It needs nothing but `/events`."""

    def __init__(self) -> None:
        self.html = (files(__package__) / PAGE_FILE).read_text(encoding="utf-8")
        script, style = (_sources(tag, self.html) for tag in ("script", "style"))
        self.policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        """Its Content-Security-Policy: what is written in the file runs, and nothing that might
        get into it by a name or a message."""


def _sources(tag: str, html: str) -> str:
    """The hash of each element of a kind that the file has."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
