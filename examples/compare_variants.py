"""Compare a variant of your own with the baseline: both train with the same seeds, and losses are compared in pairs.

`gated-attention compare` does the same for the variants of the registry. The text is this package's own source, so
nothing is downloaded. These runs are far too short to judge a gate.
"""

import sys
from dataclasses import replace
from pathlib import Path

import gated_attention
from gated_attention import GateSpec
from gated_attention.device import pick_device
from gated_attention.registry.variants import Variant, get_variant
from gated_attention.report.study.page import write_report
from gated_attention.report.study.terminal import Display
from gated_attention.spec import BlockSpec
from gated_attention.study.comparison import LOSS, compare_variants
from gated_attention.study.plan import make_plan
from gated_attention.study.run import run_study

MINE = Variant("mine", BlockSpec((GateSpec(granularity="headwise", input_dim=32, bias=1.0),)))


def main(output: Path) -> None:
    device = pick_device("cpu")
    text = {"source": str(Path(gated_attention.__file__).parent), "block_size": 64, "max_validation_tokens": 4096}
    training = {"steps": 20, "batch_size": 4, "evaluate_every": 20, "checkpoint_every": 20}
    plan = make_plan(name="example", size="tiny", seeds=2, output=output, device=device, data=text, train=training)
    small = replace(plan.size, num_hidden_layers=2)
    plan = replace(plan, size=small, variants=(get_variant("baseline"), MINE))

    with Display(plan, device) as display:
        results = run_study(plan, device, output / "cache", display)  # run again to resume

    for row in compare_variants(results).rows:
        print(f"{row.variant}: {row.gate}, held-out loss {row.mean(LOSS):.3f} nats per token", end="")
        print(f", {row.difference.mean:+.3f}: {row.difference.verdict}" if row.difference else "")
    write_report(plan.runs, output / "reports" / plan.name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
