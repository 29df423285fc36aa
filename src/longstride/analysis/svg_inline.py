"""SVG files made fit to stand inside one HTML page."""

from __future__ import annotations

import html
import re


def inline(svg: str, *, prefix: str, alt: str) -> str:
    """Return an SVG document as an element for an HTML page.

    The prolog and metadata go, ids get `prefix` (two figures of one program use the same ids), the fixed size becomes a
    natural width, and the figure gets a role and a spoken description.

    Args:
        svg: the file's text.
        prefix: letters and digits, unique on the page.
        alt: what the figure shows, in words.

    Raises:
        ValueError: there is no <svg> element.
    """
    start = svg.find("<svg")
    if start < 0:
        raise ValueError("no <svg> element")
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[start:], flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', body)
    head, rest = body.split(">", 1)
    width = re.search(r'viewBox="[\d.\s-]*?\s([\d.]+)\s[\d.]+"', head)
    natural = f' style="max-width:{float(width.group(1)) * 4 / 3:.0f}px"' if width else ""
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(alt, quote=True)}"{natural}>{rest}'.strip()
