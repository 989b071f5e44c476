"""Makes a site of the repository. Links are relative paths in the repository, so that they also work on a code host.

README, CHANGELOG, CONTRIBUTING and the reports become pages unchanged, and the files that pages link to are copied.
Pages under docs move to the top of the site. Equations become MathML, which browsers show without a script.
"""

import re
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "reports/**/*.md")
LINKED = (
    *("CITATION.cff", "docs/**/*.css", "docs/**/*.svg", "src/gated_attention/**/*.py"),
    *("examples/*.py", "examples/**/*.toml"),
    *(f"reports/**/*.{kind}" for kind in ("html", "svg", "csv", "json", "jsonl", "py")),
)
LISTED = ("examples/", "reports/*/", "reports/*/records/")
"""Folders that pages link to; those without a page get a list of their files, as on a code host."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and the repository's in place of those of `docs_dir`."""
    kept = [file for file in files if file.src_dir != config.docs_dir]
    for pattern in (*PAGES, *LINKED):
        kept += [_file(path.relative_to(ROOT).as_posix(), config) for path in sorted(ROOT.glob(pattern))]
    places = {file.dest_uri for file in kept}
    for folder in (folder for pattern in LISTED for folder in sorted(ROOT.glob(pattern))):
        place = f"{folder.relative_to(ROOT).as_posix()}/index.html"
        if place not in places:
            kept.append(File.generated(config, place, content=_listing(folder)))
    if len({file.dest_uri for file in kept}) < len(kept):
        raise PluginError("two files have one place on the site")
    return Files(kept)


def _file(source: str, config: MkDocsConfig) -> File:
    place = "quick-start.md" if source == "README.md" else source.removeprefix("docs/")
    place = re.sub(r"(README|report)\.md$", "index.md", place)  # a report.html stands beside its report.md
    place = re.sub(r"\.md$", ".html", place)
    # Reports that this checkout made have no place in the navigation.
    inclusion = InclusionLevel.NOT_IN_NAV if source.startswith("reports/") else InclusionLevel.UNDEFINED
    return File(source, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=place, inclusion=inclusion)


def _listing(folder: Path) -> str:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if _is_linked(path))
    lines = "".join(f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in names)
    title = f"{folder.relative_to(ROOT).as_posix()}/"
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><ul>{lines}</ul>'


def _is_linked(path: Path) -> bool:
    return path.suffix in (".html", ".svg", ".csv", ".json", ".jsonl", ".py")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to folders lead to the list of their files; Markdown within <details> is Markdown."""
    here = ROOT / Path(page.file.src_uri).parent

    def to_list(link: re.Match[str]) -> str:
        target = link[1]
        return f"]({target.rstrip('/')}/index.html)" if "://" not in target and (here / target).is_dir() else link[0]

    markdown = re.sub(r"\]\(([^)#\s]+)\)", to_list, markdown)
    return markdown.replace("<details>", '<details markdown="1">')


def on_page_content(html: str, **_: Any) -> str:
    """Equations that arithmatex has marked, as MathML."""
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), html, flags=re.S)
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: _mathml(m[1], "block"), html, flags=re.S)


def _mathml(latex: str, display: str) -> str:
    return convert(unescape(latex).strip(), display=display)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load anything from elsewhere."""
    for page, address in _loaded(Path(config.site_dir)):
        raise PluginError(f"{page} loads {address}; the site must not load anything from elsewhere")


def _loaded(site: Path) -> Iterator[tuple[Path, str]]:
    for page in sorted(site.rglob("*.html")):
        text = re.sub(r"<(?:code|pre)\b.*?</(?:code|pre)>", "", page.read_text(encoding="utf-8"), flags=re.S)
        for tag in re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", text):
            if found := re.search(r'(?:src|href)="?((?:https?:)?//[^"\s>]+)', tag):
                yield page, found[1]
