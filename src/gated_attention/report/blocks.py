"""A document as blocks, and its two printed forms: Markdown and one self-contained HTML page.

Text inside blocks knows two marks, `code` and **bold**; everything else is escaped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from gated_attention.report.plots import INK, PAPER
from gated_attention.report.study.table import ABSENT, Cell, Column, Table

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
    """Markup of its own, with the style and the script that all widgets of its kind share.

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
    return "".join([*parts, plain(text[end:])])


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
    body = "\n".join(_html_block(block) for block in blocks)
    widgets = [block for block in blocks if isinstance(block, WidgetBlock)]
    style = _CSS + "".join(dict.fromkeys(widget.style for widget in widgets))
    script = "".join(f"<script>\n{text}</script>\n" for text in dict.fromkeys(widget.script for widget in widgets))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{script}</body>\n</html>\n"
    )


def _html_text(text: str) -> str:
    # Escaping leaves backticks and asterisks alone, so the marks are still found.
    marked = _inline(escape(text, quote=False), _tied, "<code>{}</code>", "<strong>{}</strong>")
    return _ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', marked)


def _tied(text: str) -> str:
    """Text in which no line breaks between a number and its sign or unit."""
    return text.replace(" = ", "&nbsp;=&nbsp;").replace(" %", "&nbsp;%").replace(" ± ", "&nbsp;±&nbsp;")


def _html_block(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_html_text(block.text)}</h{block.level}>"
        case Paragraph():
            role = f' class="{block.role}"' if block.role else ""
            return f"<p{role}>{_html_text(block.text)}</p>"
        case Bullets():
            return "<ul>\n" + "\n".join(f"<li>{_html_text(item)}</li>" for item in block.items) + "\n</ul>"
        case CodeBlock():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case TableBlock():
            return _html_table(block)
        case FigureBlock():
            return (
                f"<figure>\n<h3>{_html_text(block.title)}</h3>\n"
                f'<div class="plot" role="img" aria-label="{escape(block.title)}" tabindex="0">\n'
                f"{inline_svg(block.svg)}</div>\n<figcaption>{_html_text(block.caption)}</figcaption>\n</figure>"
            )
        case WidgetBlock():
            return block.markup


def _html_table(block: TableBlock) -> str:
    table, stacks = block.table, block.table.stacks()
    head = []
    for stack in stacks:
        columns = [table.columns[index] for index in stack]
        lines = "".join(_line(column.beneath, "", _html_title(column)) for column in columns)
        head.append(f'<th scope="col"{_side(columns[0].numeric)}>{lines}</th>')
    body = []
    for row in table.rows:
        cells = []
        for position, stack in enumerate(stacks):
            lines = "".join(_html_cell(block, row[index], index, named=position > 0) for index in stack)
            tag, scope = ("td", "") if position else ("th", ' scope="row"')
            cells.append(f"<{tag}{scope}{_side(table.columns[stack[0]].numeric)}>{lines}</{tag}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="table"><table>\n<thead><tr>{"".join(head)}</tr></thead>\n'
        "<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table></div>"
    )


def _html_title(column: Column) -> str:
    """Header and unit, which break a line between them and nowhere else."""
    parts = [column.header, f"({column.unit})"] if column.unit else [column.header]
    return " ".join(f"<span>{_html_text(part)}</span>" for part in parts)


def _html_cell(block: TableBlock, cell: Cell, index: int, named: bool) -> str:
    """One line of a stack; the attribute `data-name` stands in for the head on narrow screens."""
    column = block.table.columns[index]
    text = _html_text(cell.text)
    color = block.swatches.get(cell.text) if index == 0 else None
    swatch = f'<i class="swatch" style="background:{escape(color)}"></i>' if color else ""
    tone = f' class="{cell.tone}"' if cell.tone else ""
    name = f' data-name="{escape(column.title)}"' if named else ""
    absent = column.beneath and cell.text == ABSENT
    return _line(column.beneath, name, "" if absent else f"{swatch}<span{tone}>{text}</span>")


def _line(beneath: bool, name: str, content: str) -> str:
    return f"<div{name}{' class=beneath' if beneath else ''}>{content}</div>" if content else ""


def _side(numeric: bool) -> str:
    return "" if numeric else ' class="text"'


def inline_svg(svg: str) -> str:
    """A figure's SVG made part of a page: no prologue, no rules for other elements, no idle ids, the page's ink."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referred else "", svg)
    return svg.replace(INK, "currentColor").replace(PAPER, "none")


_CSS = """\
:root {
  --paper: #fff; --ink: #22272e; --soft: #5c6670; --line: #d9dee3; --shade: #f5f7f9;
  --good: #0a6b3d; --good-shade: #e2f5ea; --bad: #a3300b; --bad-shade: #fdebe3; --link: #0b62b0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e3e7eb; --soft: #9aa5b0; --line: #333b44; --shade: #1c2229;
    --good: #6fdca4; --good-shade: #12382a; --bad: #ff9e78; --bad-shade: #43210f; --link: #7ab8f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
p, ul { max-width: 44rem; margin: 0 0 1rem; }
ul { padding-left: 1.2rem; }
li { margin-bottom: 0.4rem; }
a { color: var(--link); }
.lead { font-size: 1.1rem; }
.note { color: var(--soft); font-size: 0.9rem; }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
:not(pre) > code { background: var(--shade); padding: 0.1em 0.3em; border-radius: 4px; }
pre { background: var(--shade); border-radius: 8px; padding: 0.9rem 1.1rem; overflow-x: auto; }
.table { margin: 1.25rem 0; }
.table, .plot { overflow-x: auto; --edge: rgb(128 128 128 / 0.35);  /* a shade at the edge that hides more */
  background: linear-gradient(to right, var(--paper) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; line-height: 1.4; }
td { font-variant-numeric: tabular-nums; }
th, td { padding: 0.55rem 0.6rem; text-align: right; vertical-align: top; white-space: nowrap; font-weight: normal; }
.text { text-align: left; white-space: normal; }
th:first-child, td:first-child { padding-left: 0; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; white-space: normal; }
thead span { white-space: nowrap; }
tbody th { min-width: 10.5rem; }
tbody tr > * { border-bottom: 1px solid var(--line); }
tbody th div:first-child { font-weight: 600; }
.beneath { color: var(--soft); font-size: 0.92em; font-weight: normal; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; margin-right: 0.45em; }
.good { color: var(--good); background: var(--good-shade); padding: 0.05em 0.45em; border-radius: 4px; }
.bad { color: var(--bad); background: var(--bad-shade); padding: 0.05em 0.45em; border-radius: 4px; }
.muted { color: var(--soft); }
figure { margin: 2rem 0 2.5rem; max-width: 46rem; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 44rem; margin-top: 0.5rem; }
.plot svg { display: block; width: 100%; min-width: 34rem; height: auto; stroke-linejoin: round; }
.plot svg text { font-family: inherit !important; }
@media (max-width: 46rem) {
  main { padding-top: 1.5rem; }
  h1 { font-size: 1.5rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, th, td { display: block; text-align: left; white-space: normal; }
  tbody tr { border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem 1rem; margin-bottom: 0.9rem; }
  tbody tr > * { border: 0; padding: 0; }
  tbody th { min-width: 0; padding-bottom: 0.4rem; font-size: 1rem; }
  td div { display: flex; justify-content: space-between; gap: 1rem; padding: 0.15rem 0; }
  td div span { text-align: right; }
  td div::before { content: attr(data-name); color: var(--soft); flex: none; max-width: 50%; }
}
@media print { .plot svg { min-width: 0; } figure, tr { break-inside: avoid; } }
"""
