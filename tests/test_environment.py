"""The lock, the conda environment and the code name the same packages."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PEERS = {"colpali_engine", "maxsim_cpu"}  # `benchmark` imports them in environments of their own
NAMED_BY_USERS = {"jupyterlab", "papermill", "torch", "pylate", "datasets", "matplotlib", "seaborn"}


def applies(requirement, environment):
    """Whether a requirement's marker holds in `environment`."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""} | environment)


def requirements(lines):
    """Requirement by canonical name, of the lines that are neither comments nor hashes.

    Of a package with several versions, each for some Pythons, it is the one for this Python.
    """
    lines = [line.removesuffix(" \\") for line in lines if re.match(r"[A-Za-z]", line)]
    here = default_environment()
    found = sorted(map(Requirement, lines), key=lambda requirement: applies(requirement, here))
    by_name = {canonicalize_name(requirement.name): requirement for requirement in found}
    others = [r for r in found if by_name[canonicalize_name(r.name)] is not r]
    assert not any(applies(other, here) for other in others), "a package is listed twice"
    return by_name


def read(name):
    return requirements((ROOT / name).read_text("utf-8").splitlines())


def conda():
    """The file's dependencies, and what it asks pip for."""
    content = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *plain, pip = content["dependencies"]
    return plain, pip["pip"]


LOCK = read("requirements.lock")
DIRECT = read("requirements.in")


def version(name):
    """The version that the lock gives a package."""
    (pin,) = LOCK[name].specifier
    return pin.version


def test_the_lock_pins_everything_exactly_and_names_no_place():
    for name, requirement in LOCK.items():
        operators = [pin.operator for pin in requirement.specifier]
        assert operators == ["=="], name
        assert "*" not in version(name) and requirement.url is None, name
    text = (ROOT / "requirements.lock").read_text("utf-8")
    assert not re.search(r"://|file:|^-", text, re.M)


def test_every_package_of_the_lock_has_hashes_of_its_files():
    """Else pip refuses all of them; a wheel and the source make two, at least for most."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    pin = r"[A-Za-z][^\\]*==[^\\]+(?:\\\n    --hash=sha256:[0-9a-f]{64} ?)+"
    assert re.fullmatch(rf"(?:#.*\n)+(?:{pin}\n)+", text)
    assert text.count("--hash") > 2 * len(LOCK)


def test_package_citation_and_changelog_are_of_one_version():
    said = [
        tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"],
        yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"],
        re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M).group(1),
    ]
    assert said == [said[0]] * 3 and re.fullmatch(r"\d+\.\d+\.\d+", said[0])


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_a_direct_dependency_is_in_the_lock(name):
    assert name in LOCK
    assert DIRECT[name].specifier.contains(version(name))


def test_the_conda_environment_lists_the_direct_dependencies_at_the_locks_versions():
    _, (_, *packages) = conda()
    packages = requirements(packages)
    assert {name: str(package.specifier) for name, package in packages.items()} == {
        name: f"=={version(name)}" for name in DIRECT
    }
    assert packages.keys() >= NAMED_BY_USERS


def test_the_conda_environment_is_held_to_the_lock_and_its_hashes():
    """The lock comes first: pip takes a package's hashes from where it is named first."""
    plain, (first, *others) = conda()
    assert plain == ["python=3.11", "pip"]
    assert first == "--requirement requirements.lock"
    assert not any(line.startswith("-") for line in others)  # nor --editable: it has no hash


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_satisfies_itself(python):
    """What each locked package requires is locked too, at a version it accepts."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.9",
    }
    unmet = []
    pending = [(name, "") for name in LOCK]
    seen = set()
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen or not applies(LOCK[name], environment):
            continue
        seen.add((name, extra))
        if not applies(LOCK[name], default_environment()):
            continue  # for the other Python only: nothing is known about it here
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if not applies(needed, environment | {"extra": extra}):
                continue
            key = canonicalize_name(needed.name)
            if key not in LOCK or not needed.specifier.contains(version(key), prereleases=True):
                unmet.append(f"{name} needs {line}")
            else:
                pending += [(key, wanted) for wanted in needed.extras]
    assert not unmet
    assert len(seen) >= len(LOCK) - 20  # nearly all of them were looked at


def test_this_interpreter_runs_what_the_lock_says():
    installed = {
        name: importlib.metadata.version(name)
        for name in LOCK
        if applies(LOCK[name], default_environment())
    }
    assert installed == {name: version(name) for name in installed}


def test_what_the_code_imports_is_a_direct_dependency():
    distributions = importlib.metadata.packages_distributions()
    imported = {name for path in (ROOT / "l2p_utils").glob("*.py") for name in imports(path)}
    third_party = imported - set(sys.stdlib_module_names) - {"l2p_utils"} - PEERS
    assert {"torch", "pylate"} <= third_party
    for name in third_party:
        owners = {canonicalize_name(owner) for owner in distributions[name]}
        assert owners & DIRECT.keys(), f"{name} is imported, but none of {owners} is listed"


def imports(path):
    """Top-level names that a module imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
