"""Fonts of figures that are pixels; in SVG, text stays text and a browser chooses the fonts."""

from collections.abc import Iterable

from matplotlib.font_manager import fontManager, get_font

FIRST = "DejaVu Sans"
"""The font that matplotlib carries."""

_PLACEHOLDERS = ("Last Resort",)  # has a sign for every script, and no character of any


def fallbacks(text: str) -> tuple[list[str], str]:
    """Families of installed fonts for what the first font lacks, and the characters that no font has."""
    wanted = {character for character in text if character.isprintable()}
    families: list[str] = []
    for family, path in _installed():
        found = {character for character in wanted if ord(character) in get_font(path).get_charmap()}
        if found and family != FIRST:
            families.append(family)
        wanted -= found
        if not wanted:
            break
    return families, "".join(sorted(wanted))


def _installed() -> Iterable[tuple[str, str]]:
    """Family and file of every font, the first font first; upright ones before others, always in one order."""
    fonts = [font for font in fontManager.ttflist if not font.name.startswith(_PLACEHOLDERS)]
    fonts.sort(key=lambda font: (font.name != FIRST, font.style != "normal", abs(int(font.weight) - 400), font.name))
    return ((font.name, font.fname) for font in fonts)
