"""The site (`make site`). Sphinx starts with an empty source folder, which `collect` fills with
README, docs, notebooks and data, and pages made from them. No notebook is executed.
"""

import json
import shutil
from pathlib import Path

from docutils.nodes import math, math_block, raw, reference
from docutils.utils.math.latex2mathml import tex2mathml

from l2p_utils.claims import FINDINGS, NOTE, PARTS, check_claims, claims_table, power
from l2p_utils.figures import TITLES, draw, draw_claims, means_table, table_markdown
from l2p_utils.paper import FIGURES, TABLES, read_source
from l2p_utils.results import find_models

ROOT = Path(__file__).parents[1]
COPIED = [path.name for path in ROOT.iterdir() if path.is_file()]
COPIED += ["cluster", "data", "docs", "figures", "l2p_utils", "notebooks"]
WIDE = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n"

project, author = "Learn to Pool: the companion", "the Learn to Pool companion authors"
copyright, html_title = f"2026, {author}", "Learn to Pool"
extensions = ["myst_nb"] + [f"sphinx.ext.{n}" for n in ("autodoc", "autosummary", "napoleon")]
extensions += ["sphinx.ext.viewcode", "sphinx.ext.githubpages"]  # GitHub drops _static otherwise
include_patterns = ["index.md", "C*.md", "data/*/README.md", "docs/*.md", "docs/**.rst"]
include_patterns += ["figures/*.md", "figures/offline/claims.md", "notebooks/*"]
nb_execution_mode, myst_enable_extensions = "off", ["dollarmath"]
myst_heading_anchors, default_role, napoleon_use_ivar = 3, "py:obj", True
autodoc_default_options, autodoc_preserve_defaults = {"exclude-members": "set"}, True  # Matplotlib
templates_path, autodoc_member_order = [str(ROOT / "docs")], "bysource"
html_static_path, html_css_files, html_favicon = ["site.css"], ["site.css"], "favicon.svg"
html_theme, html_context = "sphinx_book_theme", {"default_mode": "auto"}
html_theme_options = {"navbar_persistent": []}


def collect(app, _):
    """Copy what the site shows into the source folder, and write the other pages there."""
    source = Path(app.srcdir)
    for path in map(ROOT.joinpath, COPIED):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / path.name)
    paper, ours = read_source(ROOT / "data/paper"), read_source(ROOT / "data/offline")
    pages = {"index.md": (ROOT / "docs/contents.txt").read_text("utf-8")}
    pages["figures/offline/claims.md"] = claims_page(paper, ours)
    pages |= {f"figures/{name}.md": exhibit_page(name, paper, ours) for name in FIGURES + TABLES}
    for path in ROOT.glob("data/*/README.md"):
        files = sorted(file.relative_to(path.parent) for file in path.parent.rglob("*.[!m]*"))
        lines = [path.read_text("utf-8"), "## Files\n", *map("- [{0}]({0})".format, files)]
        pages[path.relative_to(ROOT)] = "\n".join(lines)
    for path in ROOT.glob("docs/*.md"):  # the tables have pages here, the paper's beside ours
        text = path.read_text("utf-8").replace("figures/offline/table", "figures/table")
        pages[path.relative_to(ROOT)] = text
    pages |= {f"notebooks/{path.name}": with_alt(path) for path in ROOT.glob("notebooks/*.ipynb")}
    for name, text in pages.items():
        (source / name).write_text(text, "utf-8")


def with_alt(path):
    """A notebook whose cells tell MyST-NB the alt text that is stored with their picture."""
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if image := output.get("metadata", {}).get("image/png"):
                cell["metadata"]["mystnb"] = {"image": image}
    return json.dumps(notebook)


def exhibit_page(exhibit, paper, ours):
    """A figure or table of the paper with ours beside it."""
    text = f"{WIDE}# {exhibit[:-1].capitalize()} {exhibit[-1]}: {TITLES[exhibit]}\n\n"
    if exhibit in TABLES:
        text += f"{table_markdown(paper, exhibit)}\n{table_markdown(ours, exhibit)}\n"
    else:
        text += "````{container} beside\n"
        for source, folder in ((paper, "paper"), (ours, "offline")):
            image, alt = f"{folder}/{exhibit}.svg", draw(source, exhibit).alt
            text += f"```{{image}} {image}\n:width: 100%\n:alt: {alt}\n```\n"
        text += f"````\n\n{means_table([paper, ours], exhibit).to_html(classes='table')}\n\n"
    notebooks = sorted(ROOT.glob("notebooks/0[4-7]*.ipynb"))
    name = next(path.name for path in notebooks if exhibit in path.read_text("utf-8"))
    text += f"What it shows: [{name}](../notebooks/{name}). Rows: [the paper's]"
    text += f"(../data/paper/{exhibit}.csv), [ours](../data/offline/README.md). Code: "
    return text + "[figures.py](../l2p_utils/figures.py). Command: `make figures`.\n"


def claims_page(paper, ours):
    """Every part of every finding, and the rows, the code and the command behind it."""
    claims = check_claims(ours.rows, ours.per_query, paper.frame)
    text = f"{WIDE}# The findings, part by part\n\n{NOTE} {power(claims)}\n\n"
    text += f"```{{image}} claims.svg\n:alt: {draw_claims(claims).alt}\n```\n\n`make run` makes "
    text += "rows ([the stored ones](../../data/offline/README.md)), `make figures` judges them.\n"
    for number, finding in FINDINGS.items():
        table = claims_table(claims[claims["finding"] == number], note=False).splitlines()
        text += "\n".join([f"\n## {number}. {finding}\n", *table[:2], *table[3:]])
        text += f"\n\n| | rows, values per query | code | command |\n|{' --- |' * 4}\n"
        text += "".join(behind(part, ours) for part in PARTS if part.name[0] == str(number))
    text += "\n## Code\n\n```{literalinclude} ../../l2p_utils/claims.py\n"
    return text + ":start-at: def _parts\n:end-before: PARTS = \n```\n"


def behind(part, ours):
    """A part's line of links; its models are those whose cells it compares, and the baseline."""
    cells = [cell for _, *sides in part.build(part.datasets) for _, cell in sum(sides, [])]
    keys = {(ours.roles.training.get(c[1], ""), *c[2:4], c.train_renormalized) for c in cells}
    names = sorted({n for key in [*keys, [""] * 3] for n in find_models(ours.rows, *key)})
    link = "[{0}]({1}/rows/{0}.parquet), [queries]({1}/per_query/{0}.parquet)"
    links = "; ".join(link.format(name, "../../data/offline") for name in names)
    command = f'`make run PROFILE=offline ONLY="{" ".join(names)}"`'
    return f"| {part.name} | {links} | [claims.py](#code) | {command} |\n"


def polish(_, page):
    """Formulas become MathML, which browsers draw without a script; NDCG@10 is no mail address."""
    for node in [*page.findall(math), *page.findall(math_block)]:
        text = tex2mathml(node.astext(), as_block=isinstance(node, math_block))
        node.replace_self(raw("", text, format="html"))
    for node in [node for node in page.findall(reference) if "mailto:" in node.get("refuri", "")]:
        node.replace_self(node.children)


def setup(app):
    app.connect("config-inited", collect)  # before Sphinx looks for pages
    app.connect("doctree-read", polish)
