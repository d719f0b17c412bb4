"""A hub on loopback to try the paper profile with: ``python -m tests.hub FOLDER``.

Makes the miniature repositories in FOLDER, unless they are there, and serves them until Ctrl-C.
"""

import argparse
import threading
from pathlib import Path

from tests.hub.repositories import make_repositories
from tests.hub.server import serving

PROFILE = Path(__file__).parent / "paper_mini.yaml"


def main() -> None:
    """Serve, and say how to use it."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    if not (folder / "models").is_dir():
        make_repositories(folder)
    with serving(folder) as hub:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": folder / "home",
            "HF_HUB_DISABLE_XET": "1",
            "L2P_CACHE": folder / "cache",
        }
        said = " ".join(f"{name}={value}" for name, value in settings.items())
        print(f"Serving {folder}. In another terminal:\n{said} make run PROFILE={PROFILE} GPUS=2")
        threading.Event().wait()


if __name__ == "__main__":
    main()
