"""The site, built once: its links, pictures and pages, and what a browser makes of them."""

import re
import shutil
import subprocess
import sys
from posixpath import join, normpath
from urllib.parse import unquote, urlsplit

import httpx
import nbformat
import pytest
from lxml import html

from l2p_utils.claims import PARTS
from l2p_utils.files import ROOT
from l2p_utils.profile import load_profile

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-component-update"]
# By how much a page is too wide, light or dark, and what it loads from elsewhere
LOOK = """const page = document.documentElement, seen = performance.getEntriesByType("resource");
arguments[0]([page.scrollWidth - page.clientWidth, page.dataset.theme,
              seen.map(one => one.name).filter(name => !/^(file|data):/.test(name))])"""
SUM = """const [sign, index] = document.querySelector("math munder").children;
arguments[0](index.getBoundingClientRect().top - sign.getBoundingClientRect().top)"""
FOUND = """const links = "#search-results a[href^='notebooks/00_token_pooling.html']";
setInterval(() => document.querySelector(links) && arguments[0](true), 100)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built folder; a warning of Sphinx is a failure."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d"]
    command += [folder / "doctrees", source, folder / "html"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    names = [path.relative_to(site).as_posix() for path in site.rglob("*.html")]
    return {n: html.parse(site / n).getroot() for n in names if not n.startswith("_static")}


def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(pages, site):
    ids = {name: {"", *page.xpath("//@id | //@name")} for name, page in pages.items()}
    for name, page in pages.items():
        for element, _, link, _ in page.iterlinks():
            url = urlsplit(link)
            if url.scheme:
                assert element.tag == "a" and "http" in url.scheme, f"{name} loads {link}"
            else:
                target = normpath(join(name, "..", unquote(url.path))) if url.path else name
                assert (site / target).is_file(), f"{name}: {link}"
                assert unquote(url.fragment) in ids.get(target, {""}), f"{name}: {link}"


def test_every_picture_has_the_alt_text_that_is_stored_with_it(pages):
    alts = {name: [i.get("alt") for i in page.iter("img")] for name, page in pages.items()}
    assert [name for name, found in alts.items() if not all(found)] == []
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        images = [o for cell in cells for o in cell.get("outputs", []) if "image/png" in str(o)]
        stored = [output.metadata["image/png"]["alt"] for output in images]
        assert alts[f"notebooks/{path.stem}.html"] == stored
    for n in "1234":
        theirs, ours = alts[f"figures/figure{n}.html"]
        assert theirs.startswith(f"Figure {n} of the paper.") and f"Figure {n} in this" in ours


def test_modules_functions_and_formulas_are_there(pages):
    for path in (ROOT / "l2p_utils").glob("[a-z]*.py"):
        assert pages[f"docs/api/l2p_utils.{path.stem}.html"].xpath("//dt[@id]"), path
    assert pages["docs/api/l2p_utils.pooling.html"].xpath("//*[@id='l2p_utils.pooling.pool']")
    assert not any(str(ROOT) in page.text_content() for page in pages.values())
    for name, count in {"00_token_pooling": 4, "03_evaluation": 2}.items():
        page = pages[f"notebooks/{name}.html"]
        assert len(page.xpath("//math[.//mi]")) == count and "\\sum" not in page.text_content()


def test_each_claim_leads_to_its_rows_its_code_and_its_command(pages):
    lines = pages["figures/offline/claims.html"].xpath("//tr[count(td)=4]")
    assert [line[0].text_content() for line in lines] == [part.name for part in PARTS]
    for line in lines:
        names = re.search("ONLY=.(.*).$", line.text_content().strip())[1].split()
        *files, code = [link.split("/")[-1] for link in line.xpath(".//a/@href")]
        assert files == [f"{name}.parquet" for name in names for _ in range(2)] and code == "#code"
        assert "baseline" in names and {*names} <= {*load_profile("offline").evaluated_names}


def test_in_a_browser_pages_fit_search_finds_and_formulas_are_set(pages, site, request):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    request.addfinalizer(driver.terminate)
    port = next(re.findall(r"port (\d+)", line)[0] for line in driver.stdout if "success" in line)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    wanted = {"goog:chromeOptions": {"args": FLAGS}, "goog:loggingPrefs": {"browser": "ALL"}}
    answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()
    session = f"/session/{answer['value']['sessionId']}"
    request.addfinalizer(lambda: client.delete(session))

    def call(command, **parameters):
        return client.post(f"{session}/{command}", json=parameters).json()["value"]

    def look(name, script):
        call("url", url=(site / "index.html").as_uri().replace("index.html", name))
        return call("execute/async", script=script, args=[])

    for width, scheme in ((1200, "light"), (400, "dark")):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        prefers = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        for what, how in (("DeviceMetricsOverride", size), ("EmulatedMedia", prefers)):
            call("goog/cdp/execute", cmd=f"Emulation.set{what}", params=how)
        for name in (name for name in pages if "_modules" not in name):
            assert look(name, LOOK) == [0, scheme, []], f"{name} at {width} pixels"
    assert [line for line in call("se/log", type="browser") if line["level"] == "SEVERE"] == []
    assert look("notebooks/00_token_pooling.html", SUM) > 5  # pixels from its sign to its index
    assert look("search.html?q=Ward", FOUND) is True
