"""A document as blocks, and its two printed forms: Markdown and one self-contained HTML page.

Text inside blocks knows two marks, `code` and **bold**; everything else is escaped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from gated_attention.report.plots import INK, PAPER
from gated_attention.report.tables import ABSENT, Table

_MARK = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: Literal[1, 2, 3] = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text; `role` lets the page set it apart."""

    text: str
    role: Literal["", "lead", "note"] = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """An unordered list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """Lines for a shell."""

    text: str


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A table; `swatches` gives a colour to the rows whose first cell has that text."""

    table: Table
    swatches: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FigureBlock:
    """A figure as SVG text; `path` is where a Markdown page finds it."""

    path: str
    svg: str
    title: str
    caption: str


@dataclass(frozen=True, slots=True)
class WidgetBlock:
    """Markup of its own, with the templates of the style and the script that all widgets of its kind share.

    A Markdown page has `text` in its place.
    """

    markup: str
    style: str
    script: str
    text: str


Block = Heading | Paragraph | Bullets | CodeBlock | TableBlock | FigureBlock | WidgetBlock
"""What a document is a sequence of."""


def _inline(text: str, plain: Callable[[str], str], code: str, bold: str) -> str:
    """Text with its marks printed through the two patterns and the rest through `plain`."""
    parts, end = [], 0
    for match in _MARK.finditer(text):
        parts.append(plain(text[end : match.start()]))
        inside = _inline(match[2], plain, code, bold) if match[2] else ""
        parts.append(bold.format(inside) if inside else code.format(match[1]))
        end = match.end()
    return type(code)("").join([*parts, plain(text[end:])])


def markdown(blocks: Sequence[Block]) -> str:
    """The document as GitHub Markdown."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def _markdown_text(text: str) -> str:
    return _inline(text, _markdown_escape, "`{}`", "**{}**")


def _markdown_escape(text: str) -> str:
    return re.sub(r"([\\*<\[~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_markdown_text(block.text)}"
        case Paragraph():
            return _markdown_text(block.text)
        case Bullets():
            return "\n".join(f"- {_markdown_text(item)}" for item in block.items)
        case CodeBlock():
            return f"```sh\n{block.text}\n```"
        case TableBlock():
            return _markdown_table(block.table)
        case FigureBlock():
            caption = _markdown_text(block.caption)
            return f"### {_markdown_text(block.title)}\n\n![{_markdown_escape(block.title)}]({block.path})\n\n{caption}"
        case WidgetBlock():
            return _markdown_text(block.text)


def _markdown_table(table: Table) -> str:
    head = [_markdown_text(column.title) for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    body = [[_markdown_text(cell.text) for cell in row] for row in table.rows]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in [head, rule, *body]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML page that requests nothing: styles and figures are inside."""
    widgets = [block for block in blocks if isinstance(block, WidgetBlock)]
    styles = dict.fromkeys(["page.css", *(widget.style for widget in widgets)])
    scripts = dict.fromkeys(widget.script for widget in widgets)
    return render("page.html", title=title, blocks=blocks, styles=styles, scripts=scripts)


def render(name: str, **values: Any) -> str:
    """A file of `templates/` with these values, which it escapes."""
    return _templates().get_template(name).render(values)


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("gated_attention.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "kind": lambda block: type(block).__name__,
        "marked": _html_text,
        "markup": Markup,
        "figure": lambda svg: Markup(inline_svg(svg)),
    }
    templates.globals["absent"] = ABSENT
    return templates


def _html_text(text: str) -> Markup:
    return Markup(_inline(text, _html_plain, Markup("<code>{}</code>"), Markup("<strong>{}</strong>")))


def _html_plain(text: str) -> Markup:
    """Text in which no line breaks between a number and its sign or unit, with links to arXiv."""
    for loose, tied in ((" = ", "\u00a0=\u00a0"), (" %", "\u00a0%"), (" ± ", "\u00a0±\u00a0")):
        text = text.replace(loose, tied)
    escaped = str(escape(text))  # as Markup it would escape the links
    return Markup(_ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', escaped))


def inline_svg(svg: str) -> str:
    """A figure's SVG made part of a page: no prologue, no rules for other elements, no idle ids, the page's ink."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referred else "", svg)
    return svg.replace(INK, "currentColor").replace(PAPER, "none")
