"""README and docs against what they speak of: rows, verdicts, files, make targets, snippets."""

import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from qdrant_client import QdrantClient

from l2p_utils import engines, index, results
from l2p_utils.collection import Collection, load_collection
from l2p_utils.frontier import read_tokens
from l2p_utils.index import Index
from l2p_utils.profile import load_profile
from l2p_utils.statistics import interval

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in DOCS)]
OFFLINE, NEXT = ROOT / "data" / "offline", ROOT / "data" / "next"
OTHERS = ["paper", "euclidean"]  # variants of hierarchical


def cells(text, label):
    """The cells of the table row that begins with `label`."""
    return re.search(rf"^\| {re.escape(label)} \| (.*) \|$", text, re.M).group(1).split(" | ")


def per_query():
    return results.read_per_query(OFFLINE)


def ndcg(frame, model, collection, method, engine="exact", factor=None):
    """NDCG@10 of a model's rows by pool factor, or of its queries at one of them."""
    own = (frame["model"] == model) & (frame["collection"] == collection)
    curves = results.curves(results.searched(frame[own & (frame["engine"] == engine)]))
    curve = curves[curves["pool_method"] == method]
    if factor is None:
        return curve.set_index("pool_factor")["ndcg@10"]
    return curve[curve["pool_factor"] == factor].set_index("query_id")["ndcg@10"].sort_index()


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.encode()) <= 10_000


def test_the_first_numbers_are_the_rows_of_three_seeds():
    values = results.read_per_query(NEXT)
    values = values[(values["engine"] == "exact") & ~values["pool_variant"].isin(OTHERS)]

    def found(model, method, factor, unit=True):
        """NDCG@10 in points / 5: per collection (seeds, queries)."""
        chosen = values[
            (values["pool_method"] == (method if factor > 1 else "none"))
            & (values["pool_factor"] == factor)
            & (values["renormalized"] == (unit and factor > 1))
        ]
        seeds = [f"{model}-s{seed}".replace("baseline-s42", "baseline") for seed in (42, 43, 44)]
        wide = chosen.pivot_table("ndcg@10", ["collection", "query_id"], "model", observed=True)
        return [20 * part.T.to_numpy() for _, part in wide[seeds].groupby("collection")]

    def points(first, second):
        pairs = zip(found(*first), found(*second), strict=True)
        difference = interval([a - b for a, b in pairs])
        return [float(number) for number in difference[:3]]

    def kept(method, factor):
        pooled, whole = found("baseline", method, factor), found("baseline", "none", 1)
        return 100 * sum(c.mean() for c in pooled) / sum(c.mean() for c in whole)

    trained, alone = "docs-scipy-kmeans-pf1-6", "docs-scipy-pf1"
    expected = [
        *points(("baseline", "kmeans", 6), ("baseline", "kmeans", 6, False)),
        *points(("baseline", "span", 6), ("baseline", "span", 6, False)),
        *points(("baseline", "kmeans", 6), ("baseline", "span", 6)),
        *(kept("kmeans", factor) for factor in (6, 12, 24)),
        *(n for f in (2, 6, 12) for n in points((trained, "kmeans", f), (alone, "kmeans", f))),
        *points((trained, "kmeans", 6, False), (alone, "kmeans", 6, False)),
    ]
    text = README[README.index("\n1. **Scale") : README.index("These are the [rows so far]")]
    number = r"[+−]?\d+\.\d|\d+(?= %)"
    said = [float(n.replace("−", "-")) for n in re.findall(number, text)]
    assert len(said) == len(expected)
    assert said[9:12] == pytest.approx(expected[9:12], abs=0.5)  # whole percentages
    assert said[:9] + said[12:] == pytest.approx(expected[:9] + expected[12:], abs=0.051)


def test_the_verdicts_are_counted_right():
    claims = pd.read_csv(ROOT / "figures" / "offline" / "claims.csv")
    claims = claims[claims["finding"] <= 7]  # the paper's
    counts = claims["verdict"].value_counts()
    said = re.search(
        r"Of the (\d+) testable parts.*?(\d+) hold here, (\d+) are undecided and (\d+) do\s+not",
        README,
        re.S,
    )
    expected = [len(claims), *(counts[v] for v in ("holds", "undecided", "does not hold"))]
    assert [int(number) for number in said.groups()] == expected


def test_what_plaid_keeps_at_unit_length_is_the_rows():
    values = per_query()
    values = values[values["model"] == "baseline"]
    asked = set(values[values["engine"] == "plaid"]["query_id"])
    text = DOCS["pooling.md"]
    collections = re.findall(r"`(docs:\w+)`", " ".join(cells(text, "baseline, PF6")))
    every = []
    for method in ("span", "kmeans"):
        for engine, label in {
            "exact": "exact search (raw)",
            "plaid": "PLAID (unit length)",
        }.items():
            for collection, cell in zip(
                collections, cells(text, f"{method}, {label}"), strict=True
            ):
                unpooled, pooled = (
                    ndcg(values, "baseline", collection, method, engine, factor)
                    for factor in (1, 6)
                )
                share = 100 * pooled[pooled.index.isin(asked)].mean()
                share /= unpooled[unpooled.index.isin(asked)].mean()
                assert float(cell.removesuffix(" %")) == pytest.approx(share, abs=0.051)
                every.append((method, engine, share))
    span = {
        engine: [s for m, e, s in every if (m, e) == ("span", engine)]
        for engine in ("exact", "plaid")
    }
    said = re.search(r"keeps (\d+)–(\d+) % in exact search and (\d+)–(\d+) % through PLAID", README)
    ends = [f(span[engine]) for engine in ("exact", "plaid") for f in (min, max)]
    assert [int(number) for number in said.groups()] == [round(end) for end in ends]


def test_the_variants_of_hierarchical_are_the_rows():
    rows = results.read_rows(OFFLINE)
    rows = rows[(rows["model"] == "baseline") & (rows["engine"] == "exact")]
    rows = rows[rows["pool_method"] == "hierarchical"]
    means = rows.groupby(["pool_variant", "pool_factor"])["ndcg@10"].mean()
    for variant in ("pylate", "paper", "euclidean"):
        shown = [float(cell) for cell in cells(DOCS["pooling.md"], f"`{variant}`")]
        expected = [*means[variant], means[variant].mean()]
        assert shown == pytest.approx(expected, abs=0.00051)


@pytest.mark.parametrize("name", PAGES)
def test_every_linked_file_exists(name):
    links = re.findall(r"\]\(([^)#]+)(?:#.*?)?\)", (ROOT / name).read_text("utf-8"))
    links = [link for link in links if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_named_make_target_exists(name):
    text = (ROOT / name).read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)(?:PROFILE=\w+ )?make (\w+)", text, re.M))
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.M)] == []


def test_every_make_target_is_in_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^(\w+):.*## ", makefile, re.M)
    assert [target for target in targets if f"make {target}" not in README] == []


def test_the_snippets_for_ones_own_documents_run(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", DOCS["own_documents.md"], re.S)
    remembers, search = (some for some in snippets if "PooledColBERT(" in some)
    path, known = re.search(r'PooledColBERT\("(runs.*?)"\)', search).group(1), {}
    exec(search.replace(path, str(model_folder)), {})
    assert set(eval(capsys.readouterr().out)) <= {"spline", "mean", "inverse"}
    exec(remembers.replace(path, str(model_folder)), known)
    assert len(known["documents"][0]) <= 16


def test_the_commands_for_an_index_run(tmp_path, model_folder, texts, capsys, monkeypatch):
    client = QdrantClient(":memory:")
    monkeypatch.setattr(engines, "connect", lambda url: client)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    for number in range(40):  # to choose by
        text = f"Array {number} of all is sorted. Its rows have one length, as all others have too."
        (tmp_path / "in" / f"more{number}.txt").write_text(text)
    text = DOCS["own_documents.md"]
    for line in "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines():
        command = shlex.split(line.replace("DOCUMENTS", "in"))
        assert command[1:3] == ["-m", "l2p_utils.index"]
        extra = ["--model", str(model_folder)] if command[3] in ("build", "queries") else []
        assert index.main(command[3:] + extra) == 0, line
    found = capsys.readouterr().out
    assert "5.txt" in found and "times smaller than unpooled float32" in found
    assert "Chosen: " in found or "is sure to lose" in found
    assert Index.open("whole").stats()["documents"] == 40 + len(texts)
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", text, re.S) if "Index.open" in s)
    exec(snippet, {})
    assert len(capsys.readouterr().out.splitlines()) == 5
    for said in ("shrink my-index smaller --pool-factor 2 --bits 1", "remove my-index 5.txt"):
        assert index.main(shlex.split(said)) == 0
    assert index.main(["add", "my-index", "in"]) == 0
    assert index.main(["export", "my-index", "vectors.parquet"]) == 0


def test_the_snippets_on_budgets_and_on_a_way_of_ones_own_run(bundled_model, texts):
    known = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", DOCS["pooling.md"], re.S)), known)
    again = known["pool"](known["means"], 3, "span", weights=known["sizes"])
    direct = known["pool"](known["documents"], 6, "span")
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(again, direct, strict=True))
    snippets = re.findall(r"```python\n(.*?)```", DOCS["extending.md"], re.S)
    exec(next(snippet for snippet in snippets if "Way(" in snippet), known)
    corpus = dict(enumerate(texts))
    tokens = read_tokens(bundled_model, Collection("x", corpus, {}, {}))
    stored = known["ways"][1].store(tokens)
    expected = [len(np.unique(sentences)) for sentences in tokens.sentences]
    assert [len(document) for document in stored] == expected


def test_the_snippets_that_add_a_collection_and_a_claim_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"```python\n(.*?)```", DOCS["extending.md"], re.S)
    for snippet in (snippet for snippet in snippets if "print(" in snippet):
        exec(textwrap.dedent(snippet), {})
    fingerprints, verdicts = capsys.readouterr().out.splitlines()
    stored = json.loads((ROOT / "tests/fixtures/fingerprints.json").read_text())
    assert eval(fingerprints) == stored["scipy"]
    assert re.fullmatch(r"holds \(by sign\) [\d.]+ vs [\d.]+ (holds|undecided)", verdicts)


def test_the_commands_for_contributors_run():
    """In this environment; what takes minutes or changes files, as far as it can be tried."""
    text, binaries = (ROOT / "CONTRIBUTING.md").read_text("utf-8"), Path(sys.executable).parent
    commands = re.split(r" && |\n", "\n".join(re.findall(r"```\n(.*?)\n```", text, re.S)))
    options = {
        "make": ["-o", "setup", f"VENV={binaries.parent}", "--dry-run"],
        "python": ["--collect-only"],
        "ruff": ["--diff", "--no-cache"],
    }
    for command in commands:
        words = shlex.split(command, comments=True)
        name = words[0].removeprefix(".venv/bin/")
        words = [words[0] if name == "make" else binaries / name, *words[1:], *options[name]]
        if words[1] == "plan":
            words.remove("--dry-run")
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        most = 1 if name == "ruff" else 0  # 1: there is something to format
        assert done.returncode <= most, f"{command}: {done.stdout}{done.stderr}"


def table(heading):
    """First cells of the tables under a heading of artifact.md."""
    section = DOCS["artifact.md"].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (.*?) \|", section, re.M)


def test_every_column_and_every_folder_of_data_is_explained():
    names = re.findall(r"`(.+?)`", " ".join(table("Columns")))
    assert names == [*results.ROW_COLUMNS, "query_id", *results.MEASURES]
    assert {*per_query()} == {*results.SETTING, "query_id", *results.MEASURES}
    folders = re.findall(r"\[data/(\w+)\]", " ".join(table("Data and licences")))
    assert sorted(folders) == sorted(p.name for p in (ROOT / "data").iterdir() if p.is_dir())
    for path in [*ROOT.glob("data/**/*.csv"), *ROOT.glob("data/frontier/*/*.parquet")]:
        said = ROOT.joinpath("data", path.relative_to(ROOT).parts[1], "README.md").read_text(
            "utf-8"
        )
        found = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        assert [name for name in found if name not in said] == [], path


def test_the_snippets_for_reviewers_run(monkeypatch, bundled_model, reports):
    gains, run = re.findall(r"```python\n(.*?)```", DOCS["artifact.md"], re.S)
    monkeypatch.chdir(ROOT)
    exec(gains, known := {})
    rows, name = results.read_rows(OFFLINE), "docs-scipy-kmeans-pf1-6-s42"
    found = known["gain"].groupby("collection").mean()
    assert len(found) == 5 and known["scipy"].mean() == pytest.approx(known["found"].mean)
    for collection, gain in found.items():
        curves = (ndcg(rows, m, collection, "kmeans") for m in (name, "docs-scipy-pf1-s42"))
        assert gain == pytest.approx(np.subtract(*curves)[6], abs=1e-5)
    monkeypatch.chdir(reports.parent)
    monkeypatch.setattr("l2p_utils.evaluation.load_evaluated", lambda *_: bundled_model)
    exec(run.replace("docs:scipy", reports.name).replace("1000", "30"), {})
    written = {path.name for path in Path("runs", "trec", name, reports.name).iterdir()}
    expected = ("none-pf1", "kmeans-fast-pf6", "kmeans-fast-pf6-unit")
    assert written == {f"{run}.trec.gz" for run in expected}


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
    text = re.search(r"```yaml\n(description:.*?)```", DOCS["own_documents.md"], re.S).group(1)
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
