"""The report: complete, honest, reproducible, and one page that needs nothing else."""

import csv
import json
import re
from html.parser import HTMLParser
from io import StringIO
from math import nan
from pathlib import Path

import pytest
from finished_arms import report_of, write_arm

from gated_attention.report.blocks import CodeBlock, Heading, Paragraph, TableBlock, html, inline_svg, markdown
from gated_attention.report.study.page import write_report
from gated_attention.report.study.sections import count_text, source_name
from gated_attention.report.tables import Cell, Column, Table
from gated_attention.study.record import write_json


def write_demo(runs):
    """Three seeds of a baseline, a gate that is better and one that is not told apart."""
    study = runs / "demo"
    for seed, shared in enumerate((0.0, 0.3, 0.5)):
        write_arm(study, "baseline", seed, 2.0 + shared, cites=("T1.1", "T4.1"), maps=True)
        write_arm(study, "sdpa-elementwise", seed, 1.9 + shared + 0.001 * seed, cites=("T1.5", "T4.2"), gate=0.4)
        write_arm(study, "sdpa-headwise", seed, 2.0 + shared + 0.01 * (-1) ** seed, cites=("T1.10", "T4.3"), gate=0.5)
    return study


@pytest.fixture
def study(tmp_path):
    return write_demo(tmp_path / "runs")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished report, for tests that only read it."""
    folder = tmp_path_factory.mktemp("demo")
    write_report(write_demo(folder / "runs"), folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def text(demo):
    return (demo / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(demo):
    return (demo / "report.html").read_text(encoding="utf-8")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what a browser might fetch."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.links, self.ids, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_attributes(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_attributes(tag, dict(attrs))

    def handle_attributes(self, tag, attributes):
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("src", "href", "xlink:href", "data", "action", "poster"):
            if name in attributes:
                (self.links if tag == "a" else self.fetched).append(attributes[name])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_it_writes_every_file_and_says_which(study, tmp_path):
    folder = tmp_path / "report"
    written = write_report(study, folder)
    names = ["forest", "loss", "f_attn", "m_act", "gate_scores", "attention_maps"]
    figures = [f"figures/{name}.svg" for name in names]
    assert [path.relative_to(folder).as_posix() for path in written] == [
        "report.md", "report.html", "table.csv", *figures
    ]  # fmt: skip
    assert sorted(contents(folder)) == sorted(["report.md", "report.html", "table.csv", *figures])
    for figure in figures:
        assert f"]({figure})" in (folder / "report.md").read_text()


def test_the_same_runs_give_the_same_bytes(study, tmp_path):
    report_of(study, tmp_path / "one")
    report_of(study, tmp_path / "deep" / "two")
    report_of(study, tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "deep" / "two")


def test_the_page_is_well_formed_and_requests_nothing(page):
    parsed = Page(page)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in parsed.fetched)
    assert all(target.startswith(("https://arxiv.org/abs/", "#")) or target == "table.csv" for target in parsed.links)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert page.count("<svg") == 6
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_figures_on_the_page_take_its_ink(page, demo):
    drawn = page[page.index("<svg") :]
    assert "currentColor" in drawn
    assert "#fffffe" not in drawn
    assert "#fffffe" in (demo / "figures" / "loss.svg").read_text(encoding="utf-8")


def test_it_says_what_was_compared_and_what_came_out(text):
    assert "Three variants of one Qwen3 decoder (919k parameters, 3 layers of width 128" in text
    assert "3 seeds each, 100 steps of 2,048 tokens, 205k tokens per run, on CPU, 2 threads in float32" in text
    assert "**`sdpa-elementwise`** is **better** than `baseline`: loss lower by 0.0990 ± 0.0006" in text
    assert "**`sdpa-headwise`** is **within noise** of `baseline`" in text
    assert "significant if |t| > 4.30" in text


def test_the_table_in_markdown_html_and_csv_has_the_same_rows(text, page, demo):
    (line,) = [line for line in text.splitlines() if line.startswith("| sdpa-elementwise | G1")]
    assert "2.1677 ± 0.2527" in line
    assert "2.1677\xa0±\xa00.2527" in Page(page).text
    rows = list(csv.DictReader(StringIO((demo / "table.csv").read_text(encoding="utf-8"))))
    assert [row["variant"] for row in rows] == ["baseline", "sdpa-elementwise", "sdpa-headwise"]
    assert float(rows[1]["val_loss_nats"]) == pytest.approx(2.1677, abs=5e-5)


def test_it_tells_what_the_study_cost_and_links_its_records(study, text):
    # 204,800 tokens at 20,000 per second are 10.24 seconds.
    assert "| Variant | Runs | Tokens | Time per run (hours) | All runs (CPU hours) |" in text
    assert "| baseline | 3 | 614k | 0.00284 | 0.00853 |" in text
    assert "[table.csv](table.csv)\n" in text  # records elsewhere have no link
    assert "[records](runs/demo)\n" in report_of(study, study.parent.parent)


def test_long_detail_is_collapsed_and_still_in_both_forms(text, page):
    assert text.count("<details>") == page.count("<details>") == text.count("</details>") == 4
    for part in ("<summary>9 runs</summary>", "<summary>All measures</summary>"):
        assert part in text
        assert part in page


def test_the_papers_rows_stand_beside_their_baseline(text):
    (line,) = [line for line in text.splitlines() if "T1.5, T4.2" in line]
    for number in ("5.761", "6.026", "-0.0450", "0.048", "0.467", "94", "1,053", "0.116", "-0.0990 ± 0.0006"):
        assert f"| {number} " in line
    assert "orders of magnitude" in text


def test_a_study_of_our_own_variants_has_no_papers_table(tmp_path):
    for name in ("baseline", "own"):
        write_arm(tmp_path / "runs" / "demo", name, 0, cites=("eq. 8", "T7"))
    assert "Beside the paper" not in report_of(tmp_path / "runs" / "demo")


def test_one_seed_is_not_evidence(tmp_path):
    study = tmp_path / "runs" / "demo"
    write_arm(study, "baseline", 0, 2.0)
    write_arm(study, "other", 0, 1.5)
    text = report_of(study)
    assert "`other`** ended 0.5000 nats/token lower than `baseline` in one pair of runs" in text
    assert "with n = 1 there is no spread, so this is not evidence" in text
    assert "Every run" not in text


def test_diverged_runs_are_named_and_counted(study):
    for seed in range(3):
        write_arm(study, "wild", seed, nan if seed else 2.1)
        write_arm(study, "wilder", seed, nan)
    text = report_of(study)
    assert "**Diverged** (5 of 15 runs): `wild` seed 1, `wild` seed 2, `wilder` seed 0" in text
    assert "In 2 of 3 pairs a run diverged." in text
    assert "**`wilder`** cannot be compared with `baseline`: diverged." in text
    assert "2 of 3 diverged" in text
    assert "A cross marks" in text
    assert "nan" not in re.sub(r"\(figures.*", "", text).lower().split()


def test_a_diverged_baseline_leaves_nothing_to_compare(tmp_path):
    study = tmp_path / "runs" / "demo"
    write_arm(study, "baseline", 0, nan)
    write_arm(study, "other", 0, 1.5)
    assert "`other`** cannot be compared with `baseline`: diverged" in report_of(study)


def test_unfinished_runs_are_named(study):
    (study / "sdpa-headwise" / "seed2" / "result.json").unlink()
    (study / "late" / "seed0").mkdir(parents=True)
    write_json(study / "late" / "seed0" / "config.json", {})
    assert "**Not finished, left out:** `late seed 0`, `sdpa-headwise seed 2`" in report_of(study)


def test_without_a_second_variant_the_paired_columns_go_and_the_report_says_so(tmp_path):
    study = tmp_path / "runs" / "demo"
    write_arm(study, "sdpa-headwise", 0)
    text = report_of(study)
    assert "no second variant to compare with, so the paired columns are left out" in text
    assert "Verdict" not in text


def test_a_reference_that_is_not_named_baseline_is_pointed_out(tmp_path):
    study = tmp_path / "runs" / "demo"
    write_arm(study, "b", 0)
    write_arm(study, "a", 0)
    assert "No variant is named `baseline`; `a` stands in for it." in report_of(study)


@pytest.mark.parametrize(
    ("baseline", "gated", "sentence"),
    [
        (0.05, 0.01, "Below 10 times this is no sink, so the study cannot show that one is removed."),
        (0.45, 0.15, "`other` 0.1500 (removed)"),
        (0.45, 0.16, "`other` 0.1600 (not removed)"),
    ],
)
def test_sinks_are_claimed_only_where_the_baseline_has_one(tmp_path, baseline, gated, sentence):
    study = tmp_path / "runs" / "demo"
    write_arm(study, "baseline", 0, f_attn=baseline)
    write_arm(study, "other", 0, f_attn=gated)
    assert sentence in report_of(study)


def test_many_variants_are_grouped_by_verdict(tmp_path):
    study = tmp_path / "runs" / "demo"
    for seed in range(3):
        write_arm(study, "baseline", seed, 2.0 + seed)
        for place in range(6):
            write_arm(study, f"v{place}", seed, 2.0 + seed - 0.1 * place + 0.001 * seed, m_act=10.0 + place)
    text = report_of(study)
    assert "- **Better**, against `baseline` in nats/token: `v5` -0.4990, `v4` -0.3990" in text
    assert "- **Within noise**, against `baseline` in nats/token: `v0` +0.0010." in text
    assert "from `v0` 10.0 to `v5` 15.0" in text


def test_runs_of_unequal_settings_are_pointed_out(tmp_path):
    study = tmp_path / "runs" / "demo"
    write_arm(study, "baseline", 0)
    write_arm(study, "other", 0, config={"train": {"steps": 200, "precision": "float32"}}, device="NVIDIA H200")
    text = report_of(study)
    assert "**The runs do not share one setting:**" in text
    assert "`train.steps` is 100 or 200" in text
    assert "`device` is CPU, 2 threads or NVIDIA H200" in text


def test_no_folder_of_the_machine_enters_the_report(demo):
    found = b"".join(contents(demo).values())
    assert b"/home/someone" not in found
    assert str(demo.parent).encode() not in found
    assert b"corpus.jsonl" in found


def test_the_command_is_spelled_out(text):
    command = text.split("```sh\n")[1].split("\n```")[0].replace(" \\\n ", "")
    assert command == (
        "gated-attention compare --name demo --variants baseline,sdpa-elementwise,sdpa-headwise --seeds 3 --size tiny "
        "--data corpus.jsonl --tokenizer bytes --context 256 --steps 100 --batch-size 8 --learning-rate 0.004 "
        "--warmup 0.02 --no-compile --device cpu"
    )


def test_an_arm_without_metrics_or_arrays_still_reports(tmp_path):
    folder = write_arm(tmp_path / "runs" / "demo", "baseline", 0)
    (folder / "metrics.jsonl").unlink()
    (folder / "arrays.npz").unlink()
    text = report_of(tmp_path / "runs" / "demo")
    assert "figures/loss.svg" not in text
    assert "figures/f_attn.svg" in text


def test_an_earlier_reports_figures_go_and_other_files_stay(study, tmp_path):
    folder = tmp_path / "report"
    report_of(study)
    (folder / "notes.txt").write_text("mine")
    for arrays in study.glob("*/*/arrays.npz"):
        arrays.unlink()
    report_of(study)
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "f_attn.svg",
        "forest.svg",
        "loss.svg",
        "m_act.svg",
    ]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_study_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run below"):
        write_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_folder_that_cannot_be_written_is_refused(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to") as caught:
        write_report(study, tmp_path / "file" / "report")
    assert "\n" not in str(caught.value)


def test_text_is_escaped_in_both_forms():
    table = Table((Column("A", "a|b", numeric=False),), ((Cell("<b> & | 2*x"),),))
    blocks = [Heading("1 < 2"), Paragraph("a *b* `c<d` **`e` & f**"), TableBlock(table), CodeBlock("a < b && c")]
    text = markdown(blocks)
    assert "## 1 \\< 2" in text
    assert "a \\*b\\* `c<d` **`e` & f**" in text
    assert "| \\<b> & \\| 2\\*x |" in text
    page = Page(html("<title>", blocks))
    assert "a *b* c<d e & f" in page.text
    assert "<b> & | 2*x" in page.text
    assert "<strong><code>e</code> &amp; f</strong>" in html("", blocks)


def test_inline_svg_drops_idle_ids_and_foreign_rules():
    svg = '<?xml?><svg><style>*{x}</style><g id="a"/><path id="b"/><use href="#b"/><p style="fill: #22272e"/></svg>'
    assert inline_svg(svg) == '<svg><g/><path id="b"/><use href="#b"/><p style="fill: currentColor"/></svg>'


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (8_192, "8,192"),
        (491_520, "492k"),
        (919_040, "919k"),
        (999_999, "1.00M"),
        (1_213_000, "1.21M"),
        (3.5e9, "3.50B"),
    ],
)
def test_counts_in_words(count, text):
    assert count_text(int(count)) == text


def test_source_names_leave_out_folders_but_not_owners():
    assert source_name(str(Path("/data/corpus").absolute())) == "corpus"
    assert source_name("owner/corpus") == "owner/corpus"


def test_the_course_of_a_difference_is_told(tmp_path):
    study = tmp_path / "runs" / "course"
    steps, losses = (100, 200, 400), {"baseline": (3.0, 2.5, 2.0), "sdpa-headwise": (2.8, 2.4, 1.97)}
    for variant, values in losses.items():
        for seed in (0, 1):
            folder = write_arm(study, variant, seed, values[-1])
            lines = [{"step": n, "val_loss_nats": value + 0.1 * seed} for n, value in zip(steps, values, strict=True)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    course = "the difference moved, on less text than in the table"
    assert f"{course}: `sdpa-headwise` -0.1000 at step 200, -0.0300 at 400." in report_of(study)
    for steps in ((400, 400), (100, 400)):  # one point is no course, nor are points that the seeds do not share
        for seed, step in enumerate(steps):
            for folder in study.glob(f"*/seed{seed}"):
                (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "val_loss_nats": 2.0}) + "\n")
        assert course not in report_of(study)


def test_samples_of_every_variant_stand_below_their_prompt(study, tmp_path):
    assert "## Samples" not in report_of(study)  # records of before have none
    for variant in ("baseline", "sdpa-headwise"):
        write_json(study / variant / "seed0" / "samples.json", [
            {"prompt": f"p{i} `", "held_out": "```\n中文", "continuation": f"by {variant}\n\tदेव"} for i in range(2)
        ])  # fmt: skip
    text = report_of(study)
    assert "<details open>\n<summary>Passage 1 of 2</summary>" in text
    assert text.count("````text\n```\n中文\n````") == 2
    assert text.index("`baseline`\n\n```text\nby baseline\n\tदेव\n```") < text.index("by sdpa-headwise")
    assert "by sdpa-elementwise" not in text
    page = Page((study.parent.parent / "report" / "report.html").read_text(encoding="utf-8"))
    assert "by sdpa-headwise\n\tदेव" in page.text


def test_samples_that_are_none_are_refused(study):
    (study / "baseline" / "seed0" / "samples.json").write_text('[{"prompt": 3}]')
    with pytest.raises(ValueError, match=r"samples\.json"):
        report_of(study)


def test_heads_say_what_they_mean_and_what_is_better(page, text):
    assert '<abbr title="Perplexity, the exponential of the validation loss' in page
    assert "Lower is better." in page
    assert "| Validation loss ↓ (nats/token) |" in text
    assert "- **F-Attn**: Attention to the first token of a sequence" in text
