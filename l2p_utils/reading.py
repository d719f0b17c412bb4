"""What figures, tables and findings say, in words computed from their numbers.

Takes a `paper.Exhibits`, result rows or judged claims; gives Markdown and small tables. The paper's
numbers and a run's go through the same sentences, so no text can outlive the rows it speaks of.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from l2p_utils.claims import FAILS, FINDINGS, HOLDS, NOT_RUN, UNDECIDED, claims_table
from l2p_utils.files import UserError
from l2p_utils.paper import (
    ROLES,
    SUMMARY_NOTE,
    Exhibits,
    compare_with_paper,
    lengths_markdown,
    missing,
    released_markdown,
    roles_of,
    summary_markdown,
    tolerance_note,
    variants_note,
)
from l2p_utils.results import BASELINE, default_variant, relative_ndcg

# ---------------------------------------------------------------- numbers behind the words


def curves(source: Exhibits, exhibit: str) -> pd.DataFrame:
    """Relative NDCG@10 (%) of the curves that `source` has of `exhibit`.

    Returns
    -------
    Index (dataset, label, pool_method); one column a pool factor. All curves have all columns, so
    that means over factors compare like with like: a curve with fewer factors than the others (only
    measured unpooled, say) is left out.
    """
    frame = source.frame[source.frame["exhibit"] == exhibit]
    frame = frame[(frame["dataset"] != "Average") & frame["relative"].notna()]
    keys = ["dataset", "label", "pool_method"]
    if frame.empty:
        return frame.set_index(keys)[[]]
    wide = frame.pivot_table("relative", keys, "pool_factor", sort=False)
    counts = wide.notna().sum(axis="columns")
    wide = wide[counts == counts.max()].dropna(axis="columns")
    return wide[sorted(wide.columns)]


def _pooled(wide: pd.DataFrame) -> list[int]:
    return [int(factor) for factor in wide.columns if factor > 1]


def _span(factors: Iterable[int]) -> str:
    """Factors as text, runs of three or more joined: `[1, 3, 4, 5]` → "1, 3–5"."""
    runs: list[list[int]] = []
    for factor in sorted(factors):
        if runs and factor == runs[-1][-1] + 1:
            runs[-1].append(factor)
        else:
            runs.append([factor])
    texts = (f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
    return ", ".join(texts)


def _points(number: float) -> str:
    """A signed difference in points; a true minus sign, no "−0.0"."""
    return f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")


def _delta(number: float) -> str:
    return f"{round(number, 3) + 0.0:+.3f}".replace("-", "−")


def _listed(values: pd.Series) -> str:
    return ", ".join(f"{name} {value:.1f} %" for name, value in values.items())


def _leaders(values: pd.DataFrame) -> str:
    """Which line is highest at which column (pool factor), in the order of the factors."""
    best = values.idxmax()
    factors = {name: _span(best.index[best == name].astype(int)) for name in best.unique()}
    return "; ".join(f"{name} at PF {places}" for name, places in factors.items())


# ---------------------------------------------------------------- figures and tables in words


def describe(sources: Iterable[Exhibits], exhibit: str) -> str:
    """What a figure or table shows, one source after another in the same sentences (Markdown).

    Raises
    ------
    UserError
        When there are no words for `exhibit`.
    """
    if exhibit not in _WORDS:
        raise UserError(f"no words for {exhibit!r}: expected one of {list(_WORDS)}.")
    parts = []
    for source in sources:
        wide = curves(source, exhibit)
        lines = _WORDS[exhibit](source, wide) if len(wide) and _pooled(wide) else []
        gaps = missing(source, exhibit)
        lines += [f"Not run: {gaps}."] if gaps else []
        who = "The paper" if source.is_paper else "This run"
        parts.append(f"**{who}**\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def _inference(source: Exhibits, wide: pd.DataFrame) -> list[str]:
    """Figure 1: the three methods on the baseline."""
    mean = wide.groupby("pool_method", sort=False).mean()  # (methods, factors)
    pooled, count = _pooled(wide), wide.index.get_level_values("dataset").nunique()
    overall = mean[pooled].mean(axis=1).sort_values(ascending=False)
    last, first = pooled[-1], pooled[0]
    lines = [
        f"Kept of the unpooled NDCG@10, mean of PF {_span(pooled)} and {count} collections: "
        f"{_listed(overall)}.",
        f"At PF {first}: {_listed(mean.loc[overall.index, first])}. "
        f"At PF {last}: {_listed(mean.loc[overall.index, last])}.",
        f"Highest on average: {_leaders(mean[pooled])}.",
    ]
    weakest = overall.index[-1]
    places = wide.xs(weakest, level="pool_method")[last].droplevel("label")
    if count > 1:
        low, high = places.idxmin(), places.idxmax()
        lines.append(
            f"Collections differ: {weakest} at PF {last} keeps {places[low]:.1f} % on "
            f"{source.names[low][1]} and {places[high]:.1f} % on {source.names[high][1]}."
        )
    return lines


def _models(source: Exhibits, wide: pd.DataFrame) -> list[str]:
    """Figures 2 and 3, Tables 1, 3 and 4: trained models beside one baseline."""
    lines, pooled = [], _pooled(wide)
    for dataset, part in wide.groupby(level="dataset", sort=False):
        if (dataset, "Baseline") not in part.index.droplevel("pool_method"):
            continue  # nothing to compare with
        method = part.loc[(dataset, "Baseline")].index[0]
        part, where = part.droplevel(["dataset", "pool_method"]), source.names[dataset][1]
        part = part.rename({"Baseline": f"baseline ({method})"})
        # One baseline, one line a model: labels name the rows from here.
        base = part.loc[f"baseline ({method})"]
        trained = part.drop(index=base.name)
        if trained.empty:
            continue
        lines.append(f"**{where}**: highest is {_leaders(part)}.")
        lines.append(f"{where}: {_ahead(base[pooled], trained[pooled])}.")
        lines += _fixed(where, trained)
    return lines


def _ahead(base: pd.Series, trained: pd.DataFrame) -> str:
    """Which models lie above the baseline at all, some or none of the pooled factors."""
    counts = (trained > base).sum(axis="columns")
    everywhere, nowhere = counts[counts == len(base)].index, counts[counts == 0].index
    some = [f"{label} ({count} of {len(base)})" for label, count in counts.items()]
    some = [text for text, count in zip(some, counts, strict=True) if 0 < count < len(base)]
    factors = f"PF {_span(base.index.astype(int))}"
    groups = {
        f"above the {base.name} at each of {factors}": everywhere,
        f"above it at some of {factors}": some,
        f"above it at none of {factors}": nowhere,
    }
    return "; ".join(
        f"{place}: {', '.join(names)}" for place, names in groups.items() if len(names)
    )


def _fixed(where: str, trained: pd.DataFrame) -> list[str]:
    """The model trained for all factors against the best one trained for a single factor."""
    multi = [label for label in trained.index if label.endswith("PF1-6")]
    single = [label for label in trained.index if label[-4:] in (" PF2", " PF3")]
    if len(multi) != 1 or not single:
        return []
    means = trained.mean(axis=1)
    best = means[single].idxmax()
    return [
        f"{where}, one model for all factors, mean of PF {_span(trained.columns.astype(int))}: "
        f"{multi[0]} {means[multi[0]]:.1f} %, the best model for one factor ({best}) "
        f"{means[best]:.1f} %: {_points(means[multi[0]] - means[best])} points."
    ]


def _across(source: Exhibits, wide: pd.DataFrame) -> list[str]:
    """Table 2: differences to the baseline at the same factor, on other collections and its own."""
    frame = source.frame[source.frame["exhibit"] == "table2"].dropna(subset=["delta"])
    lines = []
    for label, cells in frame.groupby("label", sort=False):
        own = cells["dataset"] == cells["trained_on"]
        for name, part in (
            (" pooled, on the others", cells[~own & (cells["pool_factor"] > 1)]),
            (" unpooled, on the others", cells[~own & (cells["pool_factor"] == 1)]),
            (" pooled, on its own", cells[own & (cells["pool_factor"] > 1)]),
        ):
            if len(part):
                lines.append(f"**{source.rename(label)}**,{name}: {_deltas(source, part)}")
    return lines


def _deltas(source: Exhibits, cells: pd.DataFrame) -> str:
    count = int((cells["delta"].round(3) >= 0).sum())
    low, high = cells.loc[cells["delta"].idxmin()], cells.loc[cells["delta"].idxmax()]
    ends = (
        f"{_delta(cell.delta)} ({source.names[cell.dataset][1]}, PF {cell.pool_factor})"
        for cell in (low, high)
    )
    return (
        f"Δ ≥ 0 in {count} of {len(cells)} cells, from {' to '.join(ends)}; "
        f"mean {_delta(cells['delta'].mean())}."
    )


def _plaid(source: Exhibits, wide: pd.DataFrame) -> list[str]:
    """Figure 4: baselines, then each trained model against the baseline under its own method."""
    lines, pooled = [], _pooled(wide)
    means = wide[pooled].mean(axis=1)
    for dataset, part in means.groupby(level="dataset", sort=False):
        part, where = part.droplevel("dataset"), source.names[dataset][1]
        base = part[part.index.get_level_values("label") == "Baseline"].droplevel("label")
        text = f"**{where}**, mean of PF {_span(pooled)}: baseline {_listed(base) or 'not run'}"
        trained = part[part.index.get_level_values("label") != "Baseline"]
        if len(trained):
            best = trained.idxmax()
            text += f"; the best trained model is {source.rename(best[0])}, {trained[best]:.1f} %"
        lines.append(f"{text}.")
    return lines


_WORDS = {
    "figure1": _inference,
    "figure2": _models,
    "figure3": _models,
    "figure4": _plaid,
    "table1": _models,
    "table2": _across,
    "table3": _models,
    "table4": _models,
}

# ---------------------------------------------------------------- small tables


def means_table(sources: Iterable[Exhibits], exhibit: str) -> pd.DataFrame:
    """Relative NDCG@10 (%) of an exhibit's curves: unpooled, on average, at the largest factor.

    Returns
    -------
    One line a data set and model; for each source the columns ``PF 1``, ``mean of PF …`` and
    ``PF …``. Trained models have the difference, in points, to the baseline under the same pool
    method (else the exhibit's only baseline) in brackets. "not run" where nothing is.
    """
    tables, places = {}, {dataset: dataset for dataset in ROLES}
    for source in sources:
        tables["the paper" if source.is_paper else "this run"] = _means(curves(source, exhibit))
        if not source.is_paper:
            # The paper's own data sets have one name.
            places = {d: f"{d} · {source.names[d][1]}" for d in ROLES if not source.suites}
    table = pd.concat(tables, axis=1).rename(index=places, level=0).fillna("not run")
    return table.rename_axis(index=["", "model", "pooled with"], columns=["", ""])


def _means(wide: pd.DataFrame) -> pd.DataFrame:
    if wide.empty:
        return pd.DataFrame(index=wide.index)
    pooled = _pooled(wide)
    numbers = pd.DataFrame({"PF 1": wide[1]} if 1 in wide else {}, index=wide.index)
    if pooled:
        numbers[f"mean of PF {_span(pooled)}"] = wide[pooled].mean(axis=1)
        numbers[f"PF {pooled[-1]}"] = wide[pooled[-1]]
    return pd.DataFrame(
        [_with_gain(numbers, key) for key in numbers.index], numbers.index, numbers.columns
    )


def _with_gain(numbers: pd.DataFrame, key: tuple[str, str, str]) -> list[str]:
    dataset, label, method = key
    mine = numbers.loc[key]
    if label == "Baseline" or (dataset, "Baseline") not in numbers.index.droplevel("pool_method"):
        return [f"{value:.1f}" for value in mine]
    baselines = numbers.loc[(dataset, "Baseline")]
    base = baselines.loc[method] if method in baselines.index else baselines.iloc[0]
    return [f"{x:.1f} ({_points(x - y)})" for x, y in zip(mine, base, strict=True)]


def roles_table(paper: Exhibits, rows: pd.DataFrame) -> pd.DataFrame:
    """Which collection plays which data set's part, how large it is, and both unpooled baselines.

    Collections that were not run say so.
    """
    unpooled = paper.frame[(paper.frame["exhibit"] == "table2") & (paper.frame["pool_factor"] == 1)]
    theirs = unpooled[unpooled["label"] == "Baseline"].set_index("dataset")["ndcg"]
    ours = _baseline(rows, "exact")
    roles = roles_of(rows)
    places = [roles.evaluated(dataset) for dataset in ROLES]
    ours = ours[ours["pool_method"] == "none"].set_index("collection").reindex(places)
    table = pd.DataFrame(
        {
            "the paper's data set" if roles.own else "in the role of": list(ROLES),
            "documents": ours["documents"],
            "test queries": ours["queries"],
            "vectors a document": ours["vectors_per_document"].round(1),
            "NDCG@10, unpooled": ours["ndcg@10"].round(3),
            "the paper's": [theirs[dataset] for dataset in ROLES],
        }
    )
    return table.astype("object").fillna("not run").rename_axis("collection")


def _baseline(rows: pd.DataFrame, engine: str) -> pd.DataFrame:
    return rows[(rows["model"] == BASELINE) & (rows["engine"] == engine)]


def storage_table(rows: pd.DataFrame, pool_method: str = "kmeans") -> pd.DataFrame:
    """Mean vectors a document by collection (line) and pool factor (column), of the baseline."""
    chosen = _baseline(rows, "exact")
    chosen = chosen[chosen["pool_method"].isin(["none", pool_method])]
    wide = chosen.pivot_table("vectors_per_document", "collection", "pool_factor")
    return wide.round(1).rename(columns="PF{}".format)


def variants_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Relative NDCG@10 (%) of the baseline under each variant of hierarchical pooling.

    Means over collections; one line a variant, one column a pool factor and their mean.
    """
    chosen = _baseline(relative_ndcg(rows, partial=True), "exact")
    chosen = chosen[chosen["pool_method"] == "hierarchical"]
    wide = chosen.pivot_table("relative_ndcg@10", "pool_variant", "pool_factor")
    pooled = [int(factor) for factor in wide.columns]
    wide = wide.rename(columns="PF{}".format)
    return wide.assign(**{f"mean of PF {_span(pooled)}": wide.mean(axis=1)}).round(1)


def index_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Megabytes on disk of the baseline's PLAID indexes, and percent of the unpooled index.

    One line a collection and pool method, one column a pool factor; empty where none was built.
    """
    chosen = _baseline(rows, "plaid").dropna(subset=["index_bytes"])
    chosen = chosen.assign(mb=chosen["index_bytes"].astype(float) / 1e6)
    keys = ["collection", "pool_method"]
    wide = chosen.pivot_table("mb", keys, "pool_factor").rename(columns="PF{}".format)
    if "PF1" not in wide:
        return wide.round(2)
    whole = wide["PF1"].groupby("collection").max()  # of the unpooled line
    wide = wide.drop(index="none", level="pool_method")
    wide.insert(0, "unpooled", whole.reindex(wide.index.get_level_values("collection")).to_numpy())
    largest = wide.columns[-1]
    share = (100 * wide[largest] / wide["unpooled"]).round(0)
    return wide.drop(columns="PF1").round(2).assign(**{f"{largest}, %": share})


def engines_table(per_query: pd.DataFrame, factors: Iterable[int] = (1, 6)) -> pd.DataFrame:
    """NDCG@10 of exact search and of PLAID on the same queries, for all that has both.

    Parameters
    ----------
    factors
        Pool factors to compare at; those that were not run are left out.

    Returns
    -------
    One line a model, collection and pool method; columns ``PF1 exact``, ``PF1 PLAID`` … and
    ``queries``, how many both engines answered.
    """
    keys = ["model", "collection", "pool_method", "pool_variant", "pool_factor", "query_id"]
    split = {
        engine: per_query[per_query["engine"] == engine].set_index(keys)["ndcg@10"]
        for engine in ("exact", "plaid")
    }
    # PLAID answers a part of the queries: only those count on both sides.
    both = pd.concat(split, axis=1, join="inner").reset_index()
    groups = both.groupby(keys[:-1])
    means = groups[["exact", "plaid"]].mean().assign(queries=groups.size()).reset_index()
    return _side_by_side(means, list(factors))


def _side_by_side(means: pd.DataFrame, factors: list[int]) -> pd.DataFrame:
    keys = ["model", "collection", "pool_method"]
    unpooled = means[means["pool_factor"] == 1].set_index(keys[:2])
    pooled = means[means["pool_factor"] > 1]
    table = pooled.drop_duplicates(keys).set_index(keys)[[]]
    for factor in factors:
        at = pooled[pooled["pool_factor"] == factor].set_index(keys)
        if factor == 1:
            at = unpooled.reindex(table.index.droplevel("pool_method")).set_axis(table.index)
        if len(at):
            table[f"PF{factor} exact"] = at["exact"].round(3)
            table[f"PF{factor} PLAID"] = at["plaid"].round(3)
    counts = pooled.groupby(keys)["queries"].min()
    return table.assign(queries=counts)


def pooling_loss(per_query: pd.DataFrame) -> str:
    """How much pooling costs under each engine, on the same queries, in a sentence (Markdown)."""
    factor = int(per_query["pool_factor"].max())
    table = engines_table(per_query, (1, factor)).dropna()
    if table.empty:
        for engine, name in (("plaid", "PLAID"), ("exact", "exact search")):
            if engine not in set(per_query["engine"]):
                return f"Not run: {name}."
        return "Nothing was searched by both engines, pooled and unpooled."
    loss = {
        engine: (table[f"PF{factor} {engine}"] - table[f"PF1 {engine}"]).mean()
        for engine in ("exact", "PLAID")
    }
    gap = (table["PF1 PLAID"] - table["PF1 exact"]).mean()
    return (
        f"Mean of these {len(table)} lines: unpooled, PLAID differs from exact search by "
        f"{_delta(gap)} NDCG@10; from PF 1 to PF {factor}, exact search changes by "
        f"{_delta(loss['exact'])} and PLAID by {_delta(loss['PLAID'])}."
    )


# ---------------------------------------------------------------- a notebook's question answered


def answer(sources: Iterable[Exhibits], notebook: str, rows: pd.DataFrame | None = None) -> str:
    """What was found: each source's answer to a notebook's opening question (Markdown).

    Parameters
    ----------
    notebook
        Its number: "04" to "07".
    rows
        Result rows of the source that is not the paper, where the answer needs index sizes ("07").

    Raises
    ------
    UserError
        For another number.
    """
    if notebook not in _ANSWERS:
        raise UserError(f"no answer for {notebook!r}: expected one of {list(_ANSWERS)}.")
    parts = []
    for source in sources:
        sentences = _ANSWERS[notebook](source)
        if notebook == "07" and rows is not None and not source.is_paper:
            sentences += _index_answer(rows)
        who = "The paper" if source.is_paper else "This run"
        parts.append(f"**{who}.** {' '.join(sentences) or 'Not run.'}")
    return "\n\n".join(parts) + "\n"


def _inference_answer(source: Exhibits) -> list[str]:
    """Notebook 04: how much is left, and whether it matters how the groups are made."""
    wide = curves(source, "figure1")
    pooled, count = _pooled(wide), wide.index.get_level_values("dataset").nunique()
    if not pooled:
        return []
    mean = wide.groupby("pool_method", sort=False).mean()[pooled]
    overall = mean.mean(axis=1).sort_values(ascending=False)
    sentences = [
        "Without training for it the model keeps, of its unpooled NDCG@10 (mean of PF "
        f"{_span(pooled)} and {_collections(count)}), {_listed(overall)}."
    ]
    if len(overall) > 1:
        best, weakest, far = overall.index[0], overall.index[-1], mean[pooled[-1]]
        sentences.append(
            f"By how the groups are made, {best} and {weakest} differ by "
            f"{overall.iloc[0] - overall.iloc[-1]:.1f} points; at PF {pooled[-1]} the highest "
            f"({far.idxmax()}) and the lowest ({far.idxmin()}) by {far.max() - far.min():.1f}."
        )
    if len(overall) > 2:
        gap = overall.iloc[0] - overall.iloc[1]
        sentences.append(f"Between {best} and {overall.index[1]} it is {gap:.1f} points.")
    return sentences


def _collections(count: int) -> str:
    return f"{count} collection{'s' if count > 1 else ''}"


def _training_answer(source: Exhibits) -> list[str]:
    """Notebook 05: what comes back of what pooling costs, and whether one model serves all."""
    sentences = []
    for where, lines in _own_method(source).groupby("where", sort=False):
        texts = [
            f"{line.trained:.1f} % with {line.method} where the baseline keeps {line.base:.1f} % "
            f"({_points(line.trained - line.base)} points)"
            for line in lines.itertuples()
        ]
        sentences.append(
            f"On {where}, mean of PF {lines['factors'].iloc[0]}, a PF1-6 model pooled by its own "
            f"method keeps {'; '.join(texts)}."
        )
    control = _control(source)
    if control:
        sentences.append(
            f"Trained on {source.names['SciFact'][1]} without pooling (FT PF1) and pooled all the "
            f"same, it differs from the baseline by {', '.join(control)}."
        )
    return sentences + _one_for_all(source)


def _own_method(source: Exhibits) -> pd.DataFrame:
    """Figure 3's models and the baseline under the same method (Figure 1): means by method."""
    base, trained = curves(source, "figure1"), curves(source, "figure3")
    pooled = [factor for factor in _pooled(trained) if factor in base.columns]
    lines = [
        (method, dataset, base.loc[key, pooled].mean(), trained.loc[full, pooled].mean())
        for full in trained.index
        for dataset, label, method in [full]
        if label != "Baseline" and (key := (dataset, "Baseline", method)) in base.index
    ]
    frame = pd.DataFrame(lines if pooled else [], columns=["method", "dataset", "base", "trained"])
    means = frame.groupby("method", sort=False)[["base", "trained"]].mean()
    places = frame.groupby("method", sort=False)["dataset"].agg(list)
    where = [" and ".join(source.names[dataset][1] for dataset in names) for names in places]
    return means.assign(where=where, factors=_span(pooled)).reset_index()


#: Exhibits with FT PF1 and models for one factor beside PF1-6, one pool method each.
_BY_FACTOR = ("figure2", "table3", "table4")


def _control(source: Exhibits) -> list[str]:
    """FT PF1 less the baseline, pooled, method by method, on SciFact or what plays its part."""
    texts = []
    for exhibit in _BY_FACTOR:
        wide = curves(source, exhibit)
        pooled = _pooled(wide)
        if pooled and "SciFact" in wide.index.get_level_values("dataset"):
            part = wide.loc["SciFact", pooled].mean(axis=1)
            method = part.index[0][1]
            part = part.droplevel("pool_method")
            if {"FT PF1", "Baseline"} <= set(part.index):
                gain = part["FT PF1"] - part["Baseline"]
                texts.append(f"{_points(gain)} points with {method}")
    return texts


def _one_for_all(source: Exhibits) -> list[str]:
    """PF1-6 less the best model for one factor, over all comparisons that there are."""
    gaps = []
    for exhibit in _BY_FACTOR:
        wide = curves(source, exhibit).droplevel("pool_method")
        for _, part in wide.groupby(level="dataset", sort=False):
            means = part.droplevel("dataset").mean(axis=1)
            single = [name for name in means.index if name[-4:] in (" PF2", " PF3")]
            gaps += [
                means[name] - means[single].max()
                for name in means.index
                if name.endswith("PF1-6") and single
            ]
    if not gaps:
        return []
    ends = dict.fromkeys([_points(min(gaps)), _points(max(gaps))])  # one, where they are the same
    return [
        "Averaged over the factors, one model for all of them (PF1-6) differs from the best model "
        f"for one by {' to '.join(ends)} points ({len(gaps)} comparisons)."
    ]


def _across_answer(source: Exhibits) -> list[str]:
    """Notebook 06: gains elsewhere, at home, and the price unpooled."""
    cells = source.frame[source.frame["exhibit"] == "table2"].dropna(subset=["delta"])
    own, pooled = cells["dataset"] == cells["trained_on"], cells["pool_factor"] > 1
    sentences = []
    for text, part in (
        ("Pooled, on collections that they never saw", cells[~own & pooled]),
        ("Pooled, on their own", cells[own & pooled]),
        ("Unpooled, on collections that they never saw", cells[~own & ~pooled]),
    ):
        if len(part):
            delta = part["delta"]
            sentences.append(
                f"{text}, trained models differ from the baseline by {_delta(delta.mean())} "
                f"NDCG@10 on average: no loss in {int((delta.round(3) >= 0).sum())} of {len(part)} "
                f"cells, {_delta(delta.min())} in the worst."
            )
    return sentences


def _plaid_answer(source: Exhibits) -> list[str]:
    """Notebook 07: what is kept under PLAID, and what training adds there."""
    wide = curves(source, "figure4")
    pooled = _pooled(wide)
    if not pooled:
        return []
    means, count = wide[pooled].mean(axis=1), wide.index.get_level_values("dataset").nunique()
    base = means[means.index.get_level_values("label") == "Baseline"].droplevel("label")
    overall = base.groupby(level="pool_method", sort=False).mean().sort_values(ascending=False)
    sentences = [
        "Under PLAID the baseline keeps, of its unpooled NDCG@10 there (mean of PF "
        f"{_span(pooled)} and {_collections(count)}), {_listed(overall)}."
    ]
    gains = [
        value - base[dataset, method]
        for (dataset, label, method), value in means.items()
        if label != "Baseline" and (dataset, method) in base.index
    ]
    if gains:
        sentences.append(
            "Trained models lie above the baseline with the same pool method in "
            f"{sum(gain > 0 for gain in gains)} of {len(gains)} cases (a model on a collection), "
            f"by {_points(sum(gains) / len(gains))} points on average."
        )
    return sentences


def _index_answer(rows: pd.DataFrame) -> list[str]:
    """How much smaller the index gets, at the largest factor."""
    sizes = index_table(rows)
    shares = [column for column in sizes.columns if str(column).endswith("%")]
    if sizes.empty or not shares:
        return []
    low, high = sizes[shares[0]].min(), sizes[shares[0]].max()
    share = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    factor = shares[0].removesuffix(", %").replace("PF", "PF ")
    return [f"At {factor} the index takes {share} % of the unpooled one's bytes."]


_ANSWERS = {
    "04": _inference_answer,
    "05": _training_answer,
    "06": _across_answer,
    "07": _plaid_answer,
}


# ---------------------------------------------------------------- the findings in words


def finding(claims: pd.DataFrame, number: int) -> str:
    """One finding: its parts as a table, and how many of them hold (Markdown).

    Raises
    ------
    UserError
        When `claims` has no such finding.
    """
    parts = claims[claims["finding"] == number]
    if parts.empty:
        raise UserError(f"no finding {number}: expected one of {list(FINDINGS)}.")
    table = claims_table(parts).split("\n\n")[0]  # without the note on method
    return f"{table}\n\n{_verdict_sentence(parts)}\n"


def _verdict_sentence(parts: pd.DataFrame) -> str:
    named = [
        f"{verdict}: {', '.join(parts.loc[parts['verdict'] == verdict, 'part'])}"
        for verdict in (HOLDS, FAILS, UNDECIDED, NOT_RUN)
        if (parts["verdict"] == verdict).any()
    ]
    theirs = parts["paper_verdict"].str.startswith(HOLDS).sum()
    return (
        f"Finding {parts['finding'].iloc[0]} in this run: **{overall_verdict(parts)}** "
        f"({'; '.join(named)}). By the paper's own numbers {theirs} of {len(parts)} parts hold."
    )


def overall_verdict(parts: pd.DataFrame) -> str:
    """A finding's verdict from its parts: those that were run, taken together."""
    run = set(parts["verdict"]) - {NOT_RUN}
    if not run:
        return NOT_RUN
    if run == {HOLDS}:
        return HOLDS if (parts["verdict"] == HOLDS).all() else "holds as far as it was run"
    if run in ({FAILS}, {UNDECIDED}):
        return run.pop()
    if FAILS not in run:
        return "holds in part, nothing contradicts it"
    return "holds in part, and in part does not" if HOLDS in run else FAILS


def verdicts(claims: pd.DataFrame) -> str:
    """All findings in one table: the verdict, counts of parts, the paper's count (Markdown)."""
    counted = (HOLDS, FAILS, UNDECIDED, NOT_RUN)
    head = ["", "finding", "this run", *counted, "the paper, by sign"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for number, parts in claims.groupby("finding"):
        theirs = parts["paper_verdict"].str.startswith(HOLDS).sum()
        counts = [str((parts["verdict"] == verdict).sum() or "–") for verdict in counted]
        cells = [str(number), FINDINGS[number], f"**{overall_verdict(parts)}**", *counts]
        lines.append("| " + " | ".join([*cells, f"{theirs} of {len(parts)} hold"]) + " |")
    return "\n".join(lines) + "\n"


def conclusion(claims: pd.DataFrame) -> str:
    """What was found, computed from the verdicts: a line a group of findings (Markdown)."""
    counts = claims["verdict"].value_counts()
    judged = len(claims) - counts.get(NOT_RUN, 0)
    lines = [
        f"Of {len(claims)} parts {judged} were judged. {HOLDS}: {counts.get(HOLDS, 0)}; "
        f"{FAILS}: {counts.get(FAILS, 0)}; {UNDECIDED}: {counts.get(UNDECIDED, 0)}."
    ]
    groups: dict[str, list[int]] = {}
    for number, parts in claims.groupby("finding"):
        groups.setdefault(overall_verdict(parts), []).append(int(number))
    for verdict, numbers in groups.items():
        named = "; ".join(f"{number} ({FINDINGS[number].split(':')[0]})" for number in numbers)
        lines.append(f"**{verdict[0].upper()}{verdict[1:]}**: {named}.")
    against = claims[(claims["verdict"] == FAILS) & claims["paper_verdict"].str.startswith(HOLDS)]
    if len(against):
        lines.append("**Where this run disagrees with the paper**: " + _named_parts(against))
    agree = claims[(claims["verdict"] == HOLDS) & ~claims["paper_verdict"].str.startswith(HOLDS)]
    if len(agree):
        lines.append("**Holds here though not by the paper's numbers**: " + _named_parts(agree))
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _named_parts(parts: pd.DataFrame) -> str:
    texts = (
        f"{part.part}, {part.statement} (the paper {part.paper}; here {part.ours})"
        for part in parts.itertuples()
    )
    return "; ".join(texts) + "."


def unmeasured(rows: pd.DataFrame, paper: Exhibits, ours: Exhibits) -> str:
    """Everything of the paper's exhibits that the run lacks, an exhibit a line (Markdown)."""
    exhibits = list(dict.fromkeys(paper.frame["exhibit"]))
    gaps = {exhibit: missing(ours, exhibit) for exhibit in exhibits}
    lines = [f"- {name[:-1].capitalize()} {name[-1]}: {gap}" for name, gap in gaps.items() if gap]
    variant = default_variant(rows, "hierarchical")
    what = "\n".join(lines) if lines else "- Nothing of the paper's exhibits was left out."
    return f"{what}\n- Hierarchical pooling is read in the variant `{variant}` throughout.\n"


# ---------------------------------------------------------------- value by value


def value_by_value(paper: pd.DataFrame, rows: pd.DataFrame) -> str:
    """How many of the paper's printed values ours come close to (Markdown).

    Parameters
    ----------
    paper
        From `results.read_paper`.
    rows
        Result rows. Only those of the paper's own data sets can be compared; of others the text
        says so.
    """
    if not roles_of(rows).own:
        return (
            "Nothing to compare value by value: this run's collections are not the paper's data "
            "sets, so its numbers need not be near the paper's. The profile `paper` runs those.\n"
        )
    return "\n".join(
        [
            tolerance_note() + "\n",
            variants_note(rows) + "\n",
            SUMMARY_NOTE + "\n",
            summary_markdown(compare_with_paper(paper, rows)),
            "**Documents at 300 or at 180 tokens?** The baseline, unpooled; differences in NDCG "
            "points.\n",
            lengths_markdown(rows),
            released_markdown(paper, rows),
        ]
    )
