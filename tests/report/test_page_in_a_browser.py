"""The page of an analysis in a real browser, where there is one: it fits, and its sliders work."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from gated_attention.report.analysis.token_view import token_view
from gated_attention.report.blocks import Heading, Paragraph, TableBlock, html
from gated_attention.report.tables import Cell, Column, table_of

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """\
<script>
const slider = document.querySelector(".gates input");
slider.value = 2;
slider.dispatchEvent(new Event("input"));
const shade = document.querySelectorAll(".gates .text span")[1].style.getPropertyValue("--g");
const layer = document.querySelector("output").textContent;
const head = document.querySelector("abbr");
head.focus();
const foot = getComputedStyle(head, "::after").content.replaceAll('"', "");
document.title = [document.documentElement.scrollWidth, innerWidth, layer, shade, foot];
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_slider_picks_a_layer_and_a_head_is_explained_when_focused(width, tmp_path):
    scores = np.array([[0.1, 0.2], [0.3, 1.0]])
    names = [Cell(f"a model with a long name {i}") for i in range(2)]
    columns = {Column("Model", numeric=False): names}
    columns |= {Column(f"Measure {i}", meaning="as explained"): [Cell("0.1234")] * 2 for i in range(7)}
    blocks = [Heading("Title", 1), Paragraph("Text"), TableBlock(table_of(columns)),
              token_view("gates", ["word " * 60, "x"], scores)]  # fmt: skip
    (tmp_path / "page.html").write_text(html("t", blocks).replace("</body>", PROBE))
    # A window is 500 wide or more; a frame can be as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="800" style="border: 0"></iframe>'
        "<script>f.onload = () => { document.title = f.contentDocument.title; }</script>"
    )
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--virtual-time-budget=2000",
         "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    found = re.search(r"<title>(\d+),(\d+),layer 1,1,As explained\.</title>", done.stdout)
    assert found, done.stdout[-500:]
    assert int(found[1]) <= int(found[2]) == width
