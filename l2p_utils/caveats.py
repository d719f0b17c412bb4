"""What a run's numbers are about, and what they cannot tell: sentences that depend on its rows.

Takes result rows; gives Markdown for the notebooks that read them. Rows of the paper's own data
sets, of the bundled collections and of somebody's own documents need other words.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from l2p_utils.files import UserError
from l2p_utils.paper import roles_of
from l2p_utils.profile import BUNDLED
from l2p_utils.results import BASELINE, RELEASED

#: Points by which two models differ on a single query (standard deviation; data/offline: 15 to 19).
SPREAD = 20.0


def kind_of(rows: pd.DataFrame) -> str:
    """Whose collections these are: ``paper``, ``bundled`` or ``other``."""
    if roles_of(rows).own:
        return "paper"
    return "bundled" if rows["collection"].str.startswith(BUNDLED).any() else "other"


def collections_note(rows: pd.DataFrame) -> str:
    """What the run's collections have to do with the paper's, a paragraph."""
    return {
        "paper": "The run's collections are the paper's own: NanoBEIR for exact search, BEIR for "
        "PLAID. Numbers can be compared one by one; notebook 08 does, with a tolerance.",
        "bundled": "The run's collections are bundled ones, made from the documentation of "
        "Python packages: the query is a docstring's first line, the relevant document is the "
        "rest. Each *plays the part* of one of the paper's data sets. They share nothing with it "
        "but the place in the experiment, so compare the shape of curves and the order of methods, "
        "not numbers collection by collection.",
        "other": "The run's collections are neither the paper's nor the bundled ones that play "
        "the part of them: the paper's figures and tables have no line for them and say *not run*. "
        "`runs/<profile>/results` holds their numbers.",
    }[kind_of(rows)]


def caveats(notebook: str, rows: pd.DataFrame) -> str:
    """What cannot be learned from a notebook's numbers, as a list.

    Parameters
    ----------
    notebook
        Its number: "04" to "08".

    Raises
    ------
    UserError
        For another number.
    """
    if notebook not in CAVEATS:
        raise UserError(f"Notebook {notebook!r} has no caveats; expected one of {list(CAVEATS)}.")
    given = [caveat(rows) for caveat in CAVEATS[notebook]]
    return "\n".join(f"- {text}" for text in given if text)


# ---------------------------------------------------------------- one sentence or two each


def _small_differences(rows: pd.DataFrame, engine: str, more: str) -> str:
    queries = rows[rows["engine"] == engine].groupby("collection")["queries"].max()
    if queries.empty:
        return ""
    typical = round(queries.median())
    noise = 2 * SPREAD / math.sqrt(typical)
    through = "PLAID answers" if engine == "plaid" else "There are"
    return (
        f"**Small differences.** {through} some {typical} test queries a collection: a difference "
        f"under {noise:.0f} points of NDCG@10 on one of them is noise, where models differ by "
        f"{SPREAD:.0f} points on a typical query. {more}"
    )


def _exact(rows: pd.DataFrame) -> str:
    more = "Notebook 08 puts intervals around the differences that the paper's claims rest on."
    return _small_differences(rows, "exact", more)


def _plaid(rows: pd.DataFrame) -> str:
    return _small_differences(rows, "plaid", "")


def _model_size(rows: pd.DataFrame) -> str:
    if kind_of(rows) != "paper":
        return (
            "**Large models.** The encoder has 22 million parameters (unless the profile names "
            "another) and its documents are cut short (see `document_length` in the rows). A "
            "larger model may have more to lose, or more to spare."
        )
    return (
        "**Larger models.** The paper's encoder has 32 million parameters. One with more may have "
        "more to lose, or more to spare."
    )


def _queries(rows: pd.DataFrame) -> str:
    if kind_of(rows) != "bundled":
        return ""
    return (
        "**Real users' questions.** A docstring's first line is written by the one who wrote the "
        "rest."
    )


def _seeds(rows: pd.DataFrame) -> str:
    trained = rows[
        (rows["train_collection"] != "") & ~rows["train_collection"].str.startswith(RELEASED)
    ]
    seeds = trained.groupby(["train_collection", "train_method", "train_factors"])["seed"].nunique()
    if seeds.empty:
        return ""
    repeated = int((seeds > 1).sum())
    said = (
        f"Of {len(seeds)} kinds of training {repeated} were run with more than one seed, and their "
        "means are shown; the others once"
        if repeated
        else "Each model of this run was trained once"
    )
    return (
        f"**Whether another seed would do the same.** {said}. The paper's SciFact PF1-6 models "
        "average two runs, its others are single ones. Intervals speak of queries, not of "
        "trainings."
    )


def _training(rows: pd.DataFrame) -> str:
    theirs = (
        "The paper trains five epochs of a 32-million-parameter ColBERT on 809 (SciFact) or 5,500 "
        "(FiQA) queries, with scores of a two-billion-parameter teacher. "
    )
    if kind_of(rows) == "paper":
        return (
            f"**Whether it was the same training.** {theirs}This run took the same data; what "
            "its profile changed (epochs, rows, precision, teacher or released rows) is in each "
            "model's `provenance.json`."
        )
    return (
        f"**How far training could go.** {theirs}How long this run trained, on how many rows and "
        "with which teacher, its rows do not tell: `provenance.json` does, of each model and of "
        f"what it was trained on. Documents are cut at {_lengths(rows)} tokens, the paper's at "
        f"300.{_control(rows)}"
    )


def _lengths(rows: pd.DataFrame) -> str:
    lengths = sorted(set(rows["document_length"].dropna().astype(int)))
    return " or ".join(map(str, lengths))


def _control(rows: pd.DataFrame) -> str:
    """Where training without pooling lifts pooled search, which it does not do in the paper."""
    keys = ["collection", "engine", "pool_method", "pool_variant", "pool_factor"]
    pooled = rows[rows["pool_method"] != "none"]
    control = pooled[(pooled["train_method"] == "none") & (pooled["train_factors"] == "1")]
    control = control[control["train_collection"] == control["collection"]]
    base = pooled[pooled["model"] == BASELINE].set_index(keys)["ndcg@10"]
    gain = control.set_index(keys)["ndcg@10"] - base
    if not gain.mean() > 0:
        return ""
    return (
        " Plain fine-tuning (FT PF1) lifts pooled search here, in the paper it does the reverse. "
        "That may be because the baseline had been trained for less than the paper's finished "
        "ColBERT and had more to learn; no run here tests it."
    )


def _distance(rows: pd.DataFrame) -> str:
    if kind_of(rows) != "bundled":
        return ""
    return (
        "**How far apart the collections are.** All five are documentation of Python packages. A "
        "model that moves from SciPy to pandas presumably moves less far than one from scientific "
        "claims to questions about money; what transfers here need not transfer there."
    )


def _pruning(rows: pd.DataFrame) -> str:
    documents = rows.loc[rows["engine"] == "plaid", "documents"]
    if documents.empty:
        return ""
    if documents.max() <= 8192:
        return (
            "**Much about PLAID's pruning.** It fully scores up to 8,192 candidates, more than "
            "these collections have documents. All that is tested is compression."
        )
    return (
        "**Everything about PLAID's pruning.** It fully scores up to 8,192 candidates: the smaller "
        f"collections whole, of the largest ({documents.max():,} documents) a part."
    )


def _full_size(rows: pd.DataFrame) -> str:
    if kind_of(rows) == "paper":
        return ""
    return (
        "**BEIR.** The paper validates on full-size collections; these have "
        f"{rows['documents'].min():,} to {rows['documents'].max():,} documents each."
    )


def _own_data(rows: pd.DataFrame) -> str:
    if kind_of(rows) == "paper":
        return (
            "**More than the paper's data can.** These are its five collections and its model; "
            "the bundled collections of the `offline` profile are the test of whether findings "
            "carry over."
        )
    return (
        "**That the paper is right or wrong about its own data.** The collections are others, and "
        "encoder, training and teacher are what the profile names. A finding that holds here too "
        "is more general than the paper could say; one that does not may depend on any of what was "
        "changed, and no run here tells on which."
    )


def _many_tests(_: pd.DataFrame) -> str:
    return (
        "**Many tests at once.** Parts are not corrected for each other: of nearly thirty, one may "
        "come out on a side by chance. Read the pattern."
    )


def _speed(_: pd.DataFrame) -> str:
    return (
        "**Speed and memory in use.** Pooling cuts what is stored; what it costs to pool, in "
        "training and indexing, is not measured here (`make bench` does)."
    )


CAVEATS: dict[str, list[Callable[[pd.DataFrame], str]]] = {
    "04": [_exact, _model_size, _queries],
    "05": [_seeds, _exact, _training],
    "06": [_distance, _exact, _seeds],
    "07": [_pruning, _plaid, _full_size],
    "08": [_own_data, _seeds, _many_tests, _speed],
}
