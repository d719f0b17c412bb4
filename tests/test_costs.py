"""Estimates judged by what transformers builds and torch counts, by the plan, and by hand."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    BertConfig,
    GemmaConfig,
    ModernBertConfig,
)

from l2p_utils.costs import (
    ENCODER,
    HOST_MEMORY,
    MINER,
    POOLED,
    TEACHER,
    Architecture,
    Machine,
    estimate,
    main,
    table,
    totals,
)
from l2p_utils.files import UserError
from l2p_utils.profile import PROFILES, load_profile

ROOT = Path(__file__).parents[1]
CONFIGS = {ENCODER: ModernBertConfig, MINER: BertConfig, TEACHER: GemmaConfig}


def fake_model(shape):
    """The real model of that shape; inside a FakeTensorMode, without memory for its weights."""
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
    }
    config = CONFIGS[shape](**sizes, pad_token_id=0, attn_implementation="eager")
    if shape is TEACHER:
        config.num_key_value_heads, config.head_dim = shape.kv_heads, shape.head_dim
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize("shape", CONFIGS, ids=["encoder", "miner", "teacher"])
def test_parameters_are_those_of_the_model(shape):
    with FakeTensorMode():
        counted = sum(weight.numel() for weight in fake_model(shape).parameters())
    assert shape.parameters == pytest.approx(counted, rel=0.015)  # norms, biases, positions


@pytest.mark.parametrize("tokens", [60, 300])
@pytest.mark.parametrize("shape", CONFIGS, ids=["encoder", "miner", "teacher"])
def test_flops_are_those_that_torch_counts(shape, tokens):
    with FakeTensorMode(), torch.no_grad():
        model = fake_model(shape)
        ids = torch.zeros(2, tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
    assert 2 * shape.forward_flops(tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_a_shape_by_hand():
    shape = Architecture(1, 2, 3, 1, 1, 2, 10, gated=False)
    assert shape.body == 4 * 2 * 2 + 2 * 2 * 3
    # four tokens: 2 · 28 each, and 2 · 2 · (2 · 4 · 4) for scores and sums
    assert shape.forward_flops(4) == 2 * 28 * 4 + 2 * 2 * 2 * 16


@pytest.fixture(scope="module")
def paper():
    return load_profile("paper")


def test_the_jobs_are_those_of_the_plan(paper):
    lines = estimate(paper, Machine())
    jobs = Counter()
    for line in lines:
        jobs[line.kind.split()[0].rstrip(",:")] += line.jobs
    assert {kind: n for kind, n in jobs.items() if n} == {
        "fetch": 1, "score": 16, "mine": 2, "train": 23, "evaluate": 27, "read": 6,
    }  # fmt: skip
    assert totals(lines).jobs == 75  # as the plan has it, see test_fetch


def test_a_training_by_hand(paper):
    machine = Machine(tflops=100, small=0.1, threads=2)
    line = next(
        line for line in estimate(paper, machine) if line.kind == "train beir:fiqa, unpooled"
    )
    steps = 5 * 344  # 5,500 queries in batches of 16
    flops = ENCODER.forward_flops(300) * (3 * steps * 256 + 5 * 4_598)
    assert line.gpu == pytest.approx(flops / 1e13 / 3600)
    assert (line.jobs, line.host) == (1, 0)
    kmeans = next(
        line for line in estimate(paper, machine) if line.kind == "train beir:fiqa, kmeans"
    )
    # PF2 and PF3 always pool, PF1-6 five times of six
    seconds = (1 + 1 + 5 / 6) * steps * 256 / POOLED["kmeans sklearn"]  # on one thread
    assert kmeans.host == pytest.approx(seconds / 3600)


def test_released_rows_need_no_teacher(paper):
    released = paper.model_copy(update={"training_data": "released"})
    mined, taken = (totals(estimate(profile, Machine())) for profile in (paper, released))
    assert mined.jobs - taken.jobs == 16
    assert mined.gpu > 2 * taken.gpu and mined.disk > 2 * taken.disk


def test_the_rates_are_those_of_the_bench():
    bench = (ROOT / "figures" / "bench" / "table.md").read_text("utf-8")
    names = {
        "span": ("span", "ours"),
        "kmeans fast": ("kmeans", "ours"),
        "kmeans sklearn": ("kmeans", "scikit-learn"),
        "hierarchical pylate": ("hierarchical", "ours"),
    }
    for name, (method, engine) in names.items():
        row = re.search(rf"^\| {method} \| {engine} \| 300 \|(.*)", bench, re.M)[1].split("|")
        assert POOLED[name] == float(row[2].replace(",", "")), name  # PF2, PF3, PF4


def test_the_host_memory_is_what_the_snakefile_asks_for(paper):
    rules = (ROOT / "Snakefile").read_text("utf-8")
    for rule, memory in HOST_MEMORY.items():
        body = re.search(rf"^rule {rule}:\n(.*?)^(?:rule|if) ", rules + "rule ", re.M | re.S)[1]
        asked = re.search(r"needs\([\w.]+, ([\d_]+)", body)
        assert memory == (int(asked[1]) / 1000 if asked else 0), rule
    shown = {line.kind: line.host_memory for line in estimate(paper, Machine())}
    assert shown["evaluate, exact search"] == 48 and shown["train beir:fiqa, span"] == 24


def test_the_readme_shows_the_estimate(paper):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert table(paper, Machine()) in readme
    released = paper.model_copy(update={"training_data": "released"})
    hours = sum(line.hours for line in estimate(released, Machine()))
    assert f"about {hours:.0f} GPU hours with `training_data: released`" in readme
    own = paper.model_copy(update={"use_sklearn": False})
    saved = sum(
        a.hours - b.hours
        for a, b in zip(*(estimate(p, Machine()) for p in (paper, own)), strict=True)
    )
    assert f"with `use_sklearn: false` {saved:.0f} hours less" in " ".join(readme.split())


def test_other_machines_are_asked_for_on_the_command_line(capsys, paper):
    assert main(["paper", "--tflops", "156", "--threads", "8"]) == 0
    assert capsys.readouterr().out == table(paper, Machine(tflops=156, threads=8))


def test_what_cannot_be_estimated_is_refused(capsys, tmp_path):
    assert main(["quick"]) == 1
    assert "needs no GPU" in capsys.readouterr().err
    text = (PROFILES / "paper.yaml").read_text("utf-8")
    (tmp_path / "other.yaml").write_text(text.replace('"nano:touche"]', '"nano:arguana"]'))
    assert main([str(tmp_path / "other.yaml")]) == 1
    assert "The size of nano:arguana is not known" in capsys.readouterr().err


def test_an_bundled_profile_is_refused():
    with pytest.raises(UserError, match="expected one with hub models"):
        estimate(load_profile("smoke"), Machine())
