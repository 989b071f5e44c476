"""A study's file: lists are crossed, mistakes are one line, and the resolved file makes the same plans."""

import re
from pathlib import Path

import pytest
import torch

from gated_attention.registry.variants import variants_of
from gated_attention.study.grid.estimate import expect, find_speed
from gated_attention.study.grid.study_file import arms_in_order, read_study

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "study.toml").write_text(text)
        return tmp_path / "study.toml"

    return write


def plans_of(path):
    return read_study(path).plans(Path("out"), CPU)


def test_lists_are_crossed_and_name_the_folders(written):
    plans = plans_of(
        written(
            'name = "grid"\nvariants = ["baseline", "sdpa-headwise"]\nseeds = 2\nsize = ["tiny", "xs"]\n'
            'learning_rate = [1e-3, 0.0125]\nqk_norm = [true, false]\noptimizer = "muon"\nresidual = "bfloat16"\n'
        )
    )
    assert len(plans) == 8
    assert plans[1].point == "size-tiny_learning-rate-0.001_qk-norm-false"
    assert plans[1].runs == Path("out/runs/grid/size-tiny_learning-rate-0.001_qk-norm-false")
    assert [plan.size.name for plan in plans] == ["tiny"] * 4 + ["xs"] * 4
    assert plans[2].train.learning_rate == 0.0125
    assert plans[4].train.steps == 1500  # of its size
    assert [variant.block.qk_norm for variant in plans[1].variants] == [False, False]
    assert all(variant.block.qk_norm for variant in plans[0].variants)
    assert (plans[0].train.optimizer, plans[0].train.residual) == ("muon", "bfloat16")
    arms = arms_in_order(plans)
    assert [arm.seed for arm in arms] == [0] * 16 + [1] * 16
    assert len({arm.key for arm in arms}) == len({arm.folder for arm in arms}) == 32


def test_cuda_graphs_are_for_dense_models_on_a_gpu(written):
    path = written('name = "graphs"\nsize = ["xs", "moe-tiny"]\ncuda_graphs = true\n')
    with pytest.raises(ValueError, match="size-xs: cuda_graphs needs a GPU"):
        plans_of(path)
    with pytest.raises(ValueError, match="size-moe-tiny: cuda_graphs needs fixed shapes"):
        read_study(path).plans(Path("out"), torch.device("cuda"))
    (plan,) = read_study(written('name = "graphs"\ncuda_graphs = true\n')).plans(Path("out"), torch.device("cuda"))
    assert plan.train.cuda_graphs
    assert plan.train.compile


def test_seeds_begin_where_they_are_told(written):
    text = 'name = "later"\nvariants = ["baseline"]\nseeds = 2\nfirst_seed = 3\n'
    study = read_study(written(text))
    (plan,) = plans = study.plans(Path("out"), CPU)
    assert [arm.folder.name for arm in plan.arms] == ["seed3", "seed4"]
    assert read_study(written(study.resolved(plans))).plans(Path("out"), CPU) == plans


def test_a_study_without_lists_is_that_of_compare(written):
    (plan,) = plans_of(written('name = "one"\nvariants = ["baseline"]\nsteps = 3\n'))
    assert plan.runs == Path("out/runs/one")
    assert plan.arms[0].folder == Path("out/runs/one/baseline/seed0")
    assert str(plan.arms[0]) == "baseline seed 0"


@pytest.mark.parametrize("name", ["learning-rates", "learning-rates-tiny"])
def test_the_resolved_file_makes_the_same_plans(name, written):
    study = read_study(EXAMPLES / f"{name}.toml")
    plans = study.plans(Path("out"), CPU)
    resolved = study.resolved(plans)
    assert read_study(written(resolved)).plans(Path("out"), CPU) == plans
    assert 'precision = "float32"' in resolved
    assert re.search(r"^learning_rate = \[", resolved, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\nlearning_rates = 1e-3', "has an unknown key 'learning_rates'; the nearest is 'learning_rate'"),
        ('name = "x"\nzzz = 1', "has an unknown key 'zzz'; choose from name, variants"),
        ('name = "x"\n[train]\nsteps = 3', "has an unknown key 'train'"),
        ("seeds = 1", "has 'name' wrong"),
        ('name = "x"\nsteps = "many"', "has 'steps' wrong: input should be a valid integer, not 'many'"),
        ('name = "x"\nwarmup = [0.01, "long"]', "has 'warmup' wrong: input should be a valid number, not 'long'"),
        ('name = "x"\noptimizer = "sgd"', "has 'optimizer' wrong: input should be 'adamw' or 'muon', not 'sgd'"),
        ('name = "x"\nseeds = [0, 1]', "has 'seeds' wrong: input should be a valid integer"),
        ('name = "x"\nlearning_rate = []', "crosses no value of 'learning_rate'"),
        ('name = "x"\nlearning_rate = [0.1, 0.1]', "learning_rate 0.1 is named twice"),
        ('name = "x"\nlearning_rate = [0.1, 0.10000001]', "has two points 'learning-rate-0.1'"),
        ('name = "x"\nlearning_rate = [0.001, -1.0]', "learning-rate--1: learning_rate is -1.0"),
        ('name = "x"\nlearning_rate = nan', "learning_rate is nan"),
        ('name = "x"\nwarmup = 2024-01-01', "has 'warmup' wrong: input should be a valid number"),
        ('name = "a/b"', "study name 'a/b' cannot name a folder"),
        ('name = "x"\nvariants = ["nope"]', "unknown variant 'nope'; choose from baseline"),
        ('name = "x"\nsize = "huge"', "unknown size 'huge'"),
        ('name = "x"\nseeds = 0', "seeds is 0"),
        ('name = "x"\nfirst_seed = -1', "first_seed is -1"),
        ('name = "x"\nseeds = 9999', "arms is 29997; it must be at most 10,000"),
        ('name = "x"\narms_per_device = 0', "arms_per_device is 0"),
        ('name = "x', "is not readable TOML"),
    ],
)
def test_mistakes_are_one_line(text, message, written):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plans_of(written(text))
    assert "\n" not in str(error.value)


def test_a_grid_that_is_too_large_is_refused_at_once(written):
    listed = ", ".join(str(0.001 * (1 + i)) for i in range(200))
    text = f'name = "x"\nlearning_rate = [{listed}]\nwarmup = [{listed}]\nweight_decay = [{listed}]\n'
    with pytest.raises(ValueError, match="points is 8000000; it must be at most 10,000"):
        read_study(written(text))


def test_the_example_is_study_2_and_takes_about_an_hour_of_a_gpu():
    plans = plans_of(EXAMPLES / "learning-rates.toml")
    assert len(plans) == 7
    assert [len(plan.arms) for plan in plans] == [9] * 7
    assert plans[0].point == "learning-rate-0.001"  # the folders of the committed records
    found = [expect(plan, torch.device("cuda"), 1.8e14) for plan in plans]
    assert found[0].tokens == 1800 * 16 * 1024
    assert found[0].parameters == 50_871_808
    assert 60 < sum(one.minutes for one in found) < 180
    assert find_speed(CPU, [])[1].startswith("a rough guess for CPU")


@pytest.mark.parametrize(
    ("name", "num_arms", "num_points", "minutes"),
    [
        ("strong-baselines", 48, 4, 90),
        ("order", 57, 1, 90),
        ("scale-rates", 16, 8, 30),
        ("scale", 36, 6, 90),
        ("long-base", 3, 1, 20),
        ("moe", 9, 1, 60),
    ],
)
def test_the_studies_that_are_not_run_yet_fit_into_half_hours(name, num_arms, num_points, minutes, written):
    gpu = torch.device("cuda")
    study = read_study(EXAMPLES / f"{name}.toml")
    plans = study.plans(Path("out"), gpu)
    assert (len(plans), len(arms_in_order(plans))) == (num_points, num_arms)
    assert 0.4 * minutes < sum(expect(plan, gpu, 1.8e14).minutes for plan in plans) < minutes
    assert read_study(written(study.resolved(plans))).plans(Path("out"), gpu) == plans
    assert all(plan.data.bos or "bos-false" in plan.point for plan in plans)


def test_every_dense_row_of_tables_1_3_and_4_is_in_the_study_of_their_order():
    variants = read_study(EXAMPLES / "order.toml").settings.variants
    rows = {variant.name for table in (1, 3, 4) for variant in variants_of(table)}
    assert set(variants) == rows - {"experts-x1.03"}


def test_points_depart_from_the_settings_one_at_a_time(written):
    plans = plans_of(
        written(
            'name = "star"\nvariants = ["baseline", "sdpa-headwise"]\nsteps = [3, 5]\n'
            'points = [{ variants = ["baseline", "sandwich-norm"] }, { qk_norm = false }, '
            '{ size = "xs", bos = true }]\n'
        )
    )
    assert [plan.point for plan in plans] == [
        "steps-3", "steps-5", "qk-norm-false_steps-3", "qk-norm-false_steps-5",
        "size-xs_bos-true_steps-3", "size-xs_bos-true_steps-5",
    ]  # fmt: skip
    assert [[variant.name for variant in plan.variants] for plan in plans[1:3]] == [
        ["baseline", "sandwich-norm"], ["baseline", "sdpa-headwise"],
    ]  # fmt: skip
    assert [plan.size.name for plan in plans] == ["tiny"] * 4 + ["xs"] * 2
    assert [plan.data.bos for plan in plans] == [False] * 4 + [True] * 2
    plain, other = plans_of(written('name = "star"\npoints = [{}, { optimizer = "muon" }]\n'))
    assert (plain.point, other.point) == ("plain", "optimizer-muon")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("points = []", "has 'points' wrong: write a list of tables"),
        ("points = 3", "has 'points' wrong: write a list of tables"),
        ("points = [3]", "has 'points' wrong: write a list of tables"),
        ("points = [{ seeds = 2 }]", "points has an unknown key 'seeds'"),
        ("points = [{ step = 2 }]", "points has an unknown key 'step'; the nearest is 'steps'"),
        ("points = [{ steps = [2, 3] }]", "points gives 'steps' a list; write a table for each value"),
        ("steps = [2, 3]\npoints = [{ steps = 4 }]", "crosses 'steps' and sets it in points; keep one"),
        ("points = [{}, {}]", "has two points 'plain'"),
        ('points = [{ variants = ["nope"] }]', "unknown variant 'nope'"),
        ('points = [{ steps = "many" }]', "has 'steps' wrong: input should be a valid integer"),
    ],
)
def test_mistakes_in_points_are_one_line(points, message, written):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plans_of(written(f'name = "x"\n{points}\n'))
    assert "\n" not in str(error.value)
