"""Run the test classes of the installed transformers on our models; a failure, or a test not run, counts where plain
Qwen3 passes.

They come from transformers' sdist on the package index and stay in the cache. What it leaves out (how to start
processes, generation, exporters, pipelines) is in `missing/`, as little as the rest needs.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "peer"
CONTROLS = {"DenseHeadwise": "DenseControl", "DenseSites": "DenseControl", "MoeElementwise": "MoeControl"}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def fetch(release: str) -> Path:
    """The folder that holds the package `transformers_tests`."""
    home = CACHE / release
    if not (home / "ready").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        source = ["--no-deps", "--no-binary", "transformers", "--dest", str(home), f"transformers=={release}"]
        subprocess.run([*PIP, "download", *source], check=True)
        subprocess.run([*PIP, "install", "--no-deps", "--target", str(home), "parameterized"], check=True)
        with tarfile.open(home / f"transformers-{release}.tar.gz") as archive:
            archive.extractall(home, filter="data")
        shutil.move(home / f"transformers-{release}" / "tests", home / "transformers_tests")
        (home / "ready").touch()
    shutil.copytree(HERE / "missing", home / "transformers_tests", dirs_exist_ok=True)
    return home


def run(home: Path, arguments: list[str]) -> dict[str, dict[str, str]]:
    """What came of every test, by class and name: `passed`, `skipped` or `failed`."""
    report = home / "report.xml"
    path = os.pathsep.join([str(home), str(HERE.parents[1] / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(HERE),
        "--tb=short",
        "--durations=25",
    ]
    command += ["-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}", str(HERE / "classes.py"), *arguments]
    subprocess.run(command, env=environment, check=False)
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(case.attrib["classname"].rsplit(".", 1)[-1], {})[case.attrib["name"]] = outcome
    return found


def main() -> int:
    """Print one table and say by the exit status whether a failure counts."""
    release = version("transformers")
    found = run(fetch(release), sys.argv[1:])
    counted = 0
    print(
        f"\ntransformers {release}\n"
        f"{'class':18}{'passed':>8}{'skipped':>9}{'failed':>8}{'control failed':>16}{'not run':>9}{'counted':>9}"
    )
    for ours, theirs in CONTROLS.items():
        tests, control = found.get(ours, {}), found.get(theirs, {})
        fails = [name for name, outcome in tests.items() if outcome == "failed"]
        excused = [name for name in fails if control.get(name) == "failed"]
        unrun = [name for name in control if control[name] == "passed" and tests.get(name) not in ("passed", "failed")]
        mine = sorted((set(fails) - set(excused)) | set(unrun))
        of, counted = Counter(tests.values()), counted + len(mine)
        print(f"{ours:18}{of['passed']:8}{of['skipped']:9}{of['failed']:8}{len(excused):16}{len(unrun):9}{len(mine):9}")
        for name in mine:
            print(f"  {name}: {tests.get(name, 'not run')}; {theirs}: {control.get(name, 'has no such test')}")
    unseen = [name for name in CONTROLS if not found.get(name)]
    if unseen:
        print(f"no test ran for {', '.join(unseen)}")
    return int(bool(counted or unseen))


if __name__ == "__main__":
    sys.exit(main())
