"""What a run made, where it is, and how long each stage took.

Takes a profile's run folder (logs/*.json as `l2p_utils.execute` writes them); gives text.
``python -m l2p_utils.report PROFILE``
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import Any

from l2p_utils.execute import duration
from l2p_utils.files import UserError, read_json
from l2p_utils.profile import load_profile

COLUMNS = "{:<24} {:>9} {:>13} {:>13} {:>9}"


def report(folder: str | Path) -> str:
    """The run in `folder` as text: a line a stage, then where things are, then what failed.

    Times are each notebook's last execution. A notebook that found everything made and only read it
    took seconds; its earlier, longer executions stay in its log.

    Raises
    ------
    UserError
        When nothing was run in `folder`.
    """
    folder = Path(folder)
    jobs = [_last(path) for path in sorted((folder / "logs").glob("*.json"))]
    if not jobs:
        raise UserError(f"No notebook was run in {_short(folder)}; expected logs. Try `make run`.")
    lines = [COLUMNS.format("stage", "notebooks", "total", "longest", "memory")]
    for stage in dict.fromkeys(job["stage"] for job in jobs):
        lines.append(_line(stage, [job for job in jobs if job["stage"] == stage]))
    lines += ["", f"At work for {duration(_busy_seconds(jobs))}, jobs side by side counted once."]
    lines += ["", *_places(folder)]
    failed = [job["job"] for job in jobs if job["status"] != "done"]
    if failed:
        lines += ["", "FAILED (errors above; what depends on them was not run):"]
        lines += [f"  {_short(folder / 'notebooks' / name)}.failed.ipynb" for name in failed]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report of a profile's run, or only check the profile."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.report", description=main.__doc__)
    parser.add_argument("profile", nargs="?", default="quick")
    parser.add_argument("--check", action="store_true", help="only check that the profile is valid")
    options = parser.parse_args(arguments)
    try:
        folder = load_profile(options.profile).folder
        if not options.check:
            print("\n" + report(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _last(path: Path) -> dict[str, Any]:
    log = read_json(path)
    return {"job": log["job"], "stage": log["job"].split("--")[0], **log["entries"][-1]}


def _line(stage: str, jobs: list[dict[str, Any]]) -> str:
    seconds = [job["seconds"] for job in jobs]
    peak = max(job["peak_megabytes"] for job in jobs) / 1000
    return COLUMNS.format(
        stage, len(jobs), duration(sum(seconds)), duration(max(seconds)), f"{peak:.1f} GB"
    )


def _busy_seconds(jobs: list[dict[str, Any]]) -> float:
    """Length of the union of the jobs' intervals: pauses between two starts do not count."""
    spans = sorted(
        tuple(datetime.datetime.fromisoformat(job[key]).timestamp() for key in ("start", "end"))
        for job in jobs
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _places(folder: Path) -> list[str]:
    kinds = {
        "executed notebooks": ("notebooks", "[!.]*.html", "each as .ipynb and .html"),
        "result rows": ("results", "*.csv", "one file a model"),
        "figures": ("figures", "**/*.png", "PNG and SVG"),
        "tables": ("figures", "**/*.md", "Markdown and CSV"),
    }
    lines = []
    for what, (name, pattern, remark) in kinds.items():
        count = len(list((folder / name).glob(pattern)))
        if count:
            lines.append(f"{what:<20} {_short(folder / name)}/  ({count}; {remark})")
    return lines


def _short(path: Path) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
