"""A document as blocks, and its two printed forms: Markdown and one self-contained HTML page.

Text inside blocks knows two marks, `code` and **bold**; everything else is escaped.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from gated_attention.files import write_all, writing_to
from gated_attention.report.plots import INK, PAPER, to_svg
from gated_attention.report.tables import ABSENT, Table

_MARK = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


class Heading(NamedTuple):
    """A heading; level 1 is the title."""

    text: str
    level: Literal[1, 2, 3] = 2

    @property
    def anchor(self) -> str:
        """The id that GitHub gives it, too."""
        return re.sub(r"[^\w-]", "", self.text.lower().replace(" ", "-"))


class Paragraph(NamedTuple):
    """Running text; `role` lets the page set it apart."""

    text: str
    role: Literal["", "lead", "note", "name"] = ""


class Bullets(NamedTuple):
    """An unordered list."""

    items: Sequence[str]


class CodeBlock(NamedTuple):
    """Lines that keep their breaks: commands, or text that wraps."""

    text: str
    language: Literal["sh", "text"] = "sh"


class Links(NamedTuple):
    """A row of links: words to address."""

    name: str
    targets: Mapping[str, str]


class TableBlock(NamedTuple):
    """A table; `swatches` maps the text of a row's first cell to a colour."""

    table: Table
    swatches: Mapping[str, str] = MappingProxyType({})


class FigureBlock(NamedTuple):
    """A figure as SVG text; `path` is its file beside a Markdown page."""

    path: str
    svg: str
    title: str
    caption: str


class WidgetBlock(NamedTuple):
    """Markup with the templates of its style and script; a Markdown page has `text` instead."""

    markup: str
    style: str
    script: str
    text: str


class Details(NamedTuple):
    """Blocks that a reader opens by their summary."""

    summary: str
    blocks: Sequence["Block"]
    is_open: bool = False


Block = Heading | Paragraph | Bullets | CodeBlock | Links | TableBlock | FigureBlock | WidgetBlock | Details
"""What a document is a sequence of."""


def figure_block(path: str, figure: Figure, title: str, caption: str) -> FigureBlock:
    """A drawn figure as a block."""
    return FigureBlock(path, to_svg(figure, salt=PurePath(path).stem), title, caption)


def explained(summary: str, *tables: Table) -> Details:
    """What the columns of tables mean, each once."""
    meanings = {column.header: column.explanation for table in tables for column in table.columns if column.meaning}
    return Details(summary, [Bullets([f"**{header}**: {text}" for header, text in meanings.items()])])


def with_contents(document: Iterable[Block]) -> list[Block]:
    """The document with links to its sections below the title."""
    blocks = list(document)
    sections = {block.text: f"#{block.anchor}" for block in blocks if isinstance(block, Heading) and block.level == 2}
    return [blocks[0], Links("Contents", sections), *blocks[1:]]


def write_document(
    folder: Path, name: str, blocks: Sequence[Block], files: Mapping[str, str], stale: Iterable[str]
) -> list[Path]:
    """Write `name.md`, `name.html`, other files and the figures into a folder, made if need be; return their paths.

    Args:
        blocks: The document, its title first.
        files: Names and texts of the other files.
        stale: Names of figures of an earlier document, removed where this one does not have them.

    Raises:
        ValueError: if nothing can be written there.
    """
    title = blocks[0].text if isinstance(blocks[0], Heading) else name
    pages = {f"{name}.md": markdown(blocks), f"{name}.html": html(title, blocks)}
    figures = {block.path: block.svg for block in _opened(blocks) if isinstance(block, FigureBlock)}
    with writing_to(folder):
        return write_all(folder, {**pages, **files, **figures}, stale)


def _opened(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks, those inside `Details` in their place."""
    for block in blocks:
        if isinstance(block, Details):
            yield from _opened(block.blocks)
        else:
            yield block


def markdown(blocks: Sequence[Block]) -> str:
    """The document as GitHub Markdown."""
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def _inline(text: str, plain: Callable[[str], str], code: str, bold: str) -> str:
    """Text with its marks printed through the two patterns and the rest through `plain`."""
    parts, end = [], 0
    for match in _MARK.finditer(text):
        parts.append(plain(text[end : match.start()]))
        inside = _inline(match[2], plain, code, bold) if match[2] else ""
        parts.append(bold.format(inside) if inside else code.format(match[1]))
        end = match.end()
    return type(code)("").join([*parts, plain(text[end:])])


def _markdown_text(text: str) -> str:
    return _inline(text, _markdown_escape, "`{}`", "**{}**")


def _markdown_escape(text: str) -> str:
    return re.sub(r"([\\*<\[~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_markdown_text(block.text)}"
        case Bullets():
            return "\n".join(f"- {_markdown_text(item)}" for item in block.items)
        case CodeBlock():
            fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", block.text)), 0)
            return f"{fence}{block.language}\n{block.text}\n{fence}"
        case Links():
            return f"{block.name}: {' · '.join(f'[{text}]({target})' for text, target in block.targets.items())}"
        case TableBlock():
            return _markdown_table(block.table)
        case FigureBlock():
            caption = _markdown_text(block.caption)
            return f"### {_markdown_text(block.title)}\n\n![{_markdown_escape(block.title)}]({block.path})\n\n{caption}"
        case Details():
            summary = f"<summary>{escape(block.summary)}</summary>"
            return f"<details{' open' * block.is_open}>\n{summary}\n\n{markdown(block.blocks)}\n</details>"
        case Paragraph() | WidgetBlock():
            return _markdown_text(block.text)


def _markdown_table(table: Table) -> str:
    head = [_markdown_text(column.title) for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    body = [[_markdown_text(cell.text) for cell in row] for row in table.rows]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in [head, rule, *body]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML page that requests nothing: styles and figures are inside."""
    widgets = [block for block in _opened(blocks) if isinstance(block, WidgetBlock)]
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
    """Text with links to arXiv, in which no line breaks between a number and its sign or unit."""
    for loose, tied in ((" = ", "\u00a0=\u00a0"), (" %", "\u00a0%"), (" ± ", "\u00a0±\u00a0")):
        text = text.replace(loose, tied)
    escaped = str(escape(text))  # as Markup it would escape the links
    return Markup(_ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', escaped))


def inline_svg(svg: str) -> str:
    """A figure's SVG as part of a page: no prologue, no style rules, no unused ids, and the page's ink."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referred else "", svg)
    return svg.replace(INK, "currentColor").replace(PAPER, "none")
