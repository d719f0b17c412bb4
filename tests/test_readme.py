"""The README against what it speaks of: the claims table, the files, the make targets."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from l2p_utils.collection import load_collection
from l2p_utils.profile import load_profile
from tests.test_snakefile import plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_claims_table_is_the_reference_runs():
    between = re.search(r"<!-- claims: begin .*?-->\n(.*?)<!-- claims: end -->", README, re.S)
    assert between.group(1).strip() == (ROOT / "figures/offline/claims.md").read_text().strip()


def test_the_bench_table_is_the_stored_one():
    between = re.search(r"<!-- bench: begin .*?-->\n(.*?)<!-- bench: end -->", README, re.S)
    assert between.group(1).strip() == (ROOT / "figures/bench/table.md").read_text("utf-8").strip()


def test_the_numbers_of_the_outcome_are_the_rows():
    from l2p_utils import results

    rows = results.read_rows(ROOT / "data" / "offline")
    models = {
        "baseline (warmed up)": "baseline",
        "FT PF1 (unpooled fine-tuning)": "docs-scipy-pf1-s42",
        "FT kmeans PF1-6": "docs-scipy-kmeans-pf1-6-s42",
    }
    for label, model in models.items():
        line = re.search(rf"^\| {re.escape(label)} \|(.*)\|$", README, re.M).group(1)
        shown = [float(cell) for cell in line.split("|")]
        stored = results.series(rows, model, "docs:scipy", "kmeans").tolist()
        assert shown == pytest.approx(stored, abs=0.00051)


def test_the_gains_at_pool_factor_6_are_the_rows():
    from l2p_utils.results import compare, read_per_query

    values = read_per_query(ROOT / "data" / "offline")
    where = {"pool_method": "kmeans", "pool_factor": 6}
    ours = {"model": "docs-scipy-kmeans-pf1-6-s42", **where}
    heads = re.search(r"^\| FT kmeans PF1-6 \(trained .* against \|(.*)\|$", README, re.M).group(1)
    collections = re.findall(r"`(.*?)`", heads)
    assert len(collections) == 5
    for label, model in {"the baseline": "baseline", "FT PF1": "docs-scipy-pf1-s42"}.items():
        line = re.search(rf"^\| {label} \| (\+.*) \|$", README, re.M).group(1)
        for collection, cell in zip(collections, line.split(" | "), strict=True):
            there = {"collection": collection}
            found = compare(values, ours | there, {"model": model, **where, **there})
            points = [100 * found[key] for key in ("difference", "low", "high")]
            expected = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
            assert cell == expected.replace("-", "−"), collection


def test_what_is_said_of_the_run_with_k_means_plus_plus_is_its_rows():
    from l2p_utils import results
    from l2p_utils.claims import check_claims

    folder = ROOT / "data" / "offline" / "sklearn_kmeans"
    rows, values = results.read_rows(folder), results.read_per_query(folder)
    models = ["baseline", "docs-scipy-pf1-s42", "docs-scipy-kmeans-pf1-6-s42"]
    found = [results.series(rows, m, "docs:scipy", "kmeans").iloc[-1] for m in models]
    said = re.search(r"at PF6 (\.\d+), (\.\d+) and (\.\d+)\s+for the three models", README)
    assert [float(value) for value in said.groups()] == pytest.approx(found, abs=0.00051)
    paper = results.read_paper(ROOT / "data" / "paper")
    theirs = check_claims(rows, values, paper).set_index("part")["verdict"]
    ours = pd.read_csv(ROOT / "figures/offline/claims.csv").set_index("part")["verdict"]
    changed = theirs[theirs != ours[theirs.index]]
    assert dict(changed) == {"1a": "holds", "2d": "undecided", "3e": "holds"}


def test_the_variants_of_hierarchical_are_the_rows():
    from l2p_utils import results

    rows = results.read_rows(ROOT / "data" / "offline")
    rows = rows[(rows["model"] == "baseline") & (rows["engine"] == "exact")]
    rows = rows[rows["pool_method"] == "hierarchical"]
    means = rows.groupby(["pool_variant", "pool_factor"])["ndcg@10"].mean()
    for variant in ("pylate", "paper", "euclidean"):
        line = re.search(rf"^\| `{variant}` \|(.*)\|$", README, re.M).group(1)
        shown = [float(cell) for cell in line.split("|")]
        expected = [*means[variant], means[variant].mean()]
        assert shown == pytest.approx(expected, abs=0.00051)


def test_the_verdicts_are_counted_right():
    claims = pd.read_csv(ROOT / "figures" / "offline" / "claims.csv")
    counts = claims["verdict"].value_counts()
    said = re.search(
        r"Of the (\d+) testable parts .*?"
        r"(\d+) hold here, (\d+) are undecided and (\d+) do not hold",
        README,
        re.S,
    )
    expected = [len(claims), *(counts[v] for v in ("holds", "undecided", "does not hold"))]
    assert [int(number) for number in said.groups()] == expected


def test_every_linked_file_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`(?:PROFILE=\w+ )?make (\w+)", README))
    assert named >= {"run", "test", "lab", "figures", "notebooks", "clean", "plan"}
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.M)] == []


@pytest.fixture
def reports(tmp_path):
    """A folder in BEIR's layout: each document's number is its query's, half of them to train."""
    folder = tmp_path / "my documents" / "Reports"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        lines = [json.dumps({"_id": str(i), "text": f"text {i}"}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for split, ids in {"train": range(20), "test": range(20, 40)}.items():
        lines = ["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in ids)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines))
    return folder


def test_the_profile_for_ones_own_documents_needs_only_the_folders_path(tmp_path, reports):
    text = re.search(r"```yaml\n(description:.*?)```", README, re.S).group(1)
    assert text.count("/absolute/path/to/folder") == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("/absolute/path/to/folder", str(reports)))

    profile = load_profile(path)
    models = ["baseline", "reports-pf1-s42", "reports-kmeans-pf1-6-s42"]
    assert profile.evaluated_names == models
    assert profile.evaluation.collections == [str(reports)]
    assert (profile.evaluation.max_documents, profile.evaluation.max_queries) == (None, None)
    assert not profile.needs_hub
    for split in ("train", "dev", "test"):
        assert load_collection(profile.runs[0].collection, split).queries

    jobs = plan(tmp_path, profile=path)
    assert jobs["01_data_mining--reports"][1] == {"profile": str(path), "collection": str(reports)}
    for name in models:
        assert {f"02_training--{name}", f"03_evaluation--{name}"} < jobs.keys()
    assert len(jobs) == 2 + 2 * 3 + 6
