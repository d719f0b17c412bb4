"""GPUs of one machine shared out: each job sees those that are its own, and no other.

Takes a number of GPUs and a command; waits until so many are free, then becomes the command with
CUDA_VISIBLE_DEVICES set; a job of none sees none.
``python -m l2p_utils.devices 1 -m l2p_utils.execute …``

Snakemake counts how many GPUs its jobs hold, but does not tell them apart: without this all jobs of
a machine would compute on its first one.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from l2p_utils.files import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
PAUSE = 1.0  # seconds between two looks


def visible_devices() -> dict[str, str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees → its own unchanging id."""
    import torch  # takes seconds; the other functions do without

    names = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    names = names[:count] or [str(number) for number in range(count)]
    ids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]
    return dict(zip(names, ids, strict=True))


def claim(count: int, devices: dict[str, str], folder: Path) -> list[str] | None:
    """Take `count` free GPUs; None where fewer are free.

    A GPU is held by a lock on a file of `folder` that has its id. The locks stay open, also in the
    command that this process becomes, and go with it, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, int] = {}
    for name, identifier in devices.items():
        if len(held) < count:
            lock = os.open(folder / identifier, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[name] = lock
            except BlockingIOError:
                os.close(lock)
    if len(held) < count:
        for lock in held.values():
            os.close(lock)
        return None
    for lock in held.values():
        os.set_inheritable(lock, True)
    return list(held)


def wait_for(count: int, devices: dict[str, str], folder: Path) -> list[str]:
    """`claim`, again and again until it succeeds; ends with the process that started this one.

    Raises
    ------
    UserError
        When there are fewer GPUs than that.
    """
    if count > len(devices):
        raise UserError(
            f"The job needs {count} GPUs, but this machine shows {len(devices)} "
            f"({', '.join(devices)}). Set the profile's `processes` to at most that."
        )
    parent = os.getppid()
    while (found := claim(count, devices, folder)) is None:
        time.sleep(PAUSE)
        if os.getppid() != parent:
            sys.exit(1)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Become `python COMMAND` with COUNT GPUs of its own; with none where the machine has none."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.devices", description=main.__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    devices = visible_devices() if options.count else {}
    if not options.count:
        os.environ[VISIBLE] = ""  # another job has the GPU
    if devices:
        # of this user on this machine, whatever run a job belongs to
        folder = Path(tempfile.gettempdir()) / f"l2p-gpus-{os.getuid()}"
        try:
            os.environ[VISIBLE] = ",".join(wait_for(options.count, devices, folder))
        except UserError as error:
            print(error, file=sys.stderr)
            return 1
    os.execv(sys.executable, [sys.executable, *options.command])


if __name__ == "__main__":
    sys.exit(main())
