"""One training in several processes: started, kept in step, and ended together.

A launcher (torchrun, ``accelerate launch``, or `launch` here) starts the same command several
times; each process joins with `group`. A process that is alone needs none of it, and each function
here then does what is right for one.
"""

from __future__ import annotations

import codecs
import datetime
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from l2p_utils.files import ROOT, UserError, read_json, write_json

ERROR_FILE = "L2P_ERROR_FILE"  # set by `launch`: where a process leaves what the user can mend
PATIENCE = datetime.timedelta(hours=2)  # for the others, while the first measures or writes
KEPT_OUTPUT = 4000  # characters, for an error's text


def processes() -> int:
    """How many processes share the training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; the first one writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Wait until every process is here."""
    if processes() > 1:
        dist.all_reduce(torch.zeros(1))


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does the block, then the others: they find what it wrote."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def from_first(value: Any) -> Any:
    """The first process's `value`, on all of them."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def largest(value: float) -> float:
    """The largest `value` of all processes."""
    if processes() == 1:
        return value
    values = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.item()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place.

    A parameter that has a gradient on some processes only counts as 0 on the others; one that has
    none anywhere keeps none.
    """
    if processes() == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    dist.all_reduce(used, dist.ReduceOp.MAX)
    sums = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in sums:
        work.wait()


@contextmanager
def group() -> Iterator[None]:
    """Join the processes that a launcher started with this one; alone when there was none.

    With a GPU each process takes the one of its local number.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if ERROR_FILE in os.environ:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield
    wait()
    dist.destroy_process_group()  # not after an error: the others may be waiting in mid-sum


def leave(code: int) -> NoReturn:
    """End this process with `code`; one of several without the interpreter's own tidying up.

    By then everything is written. In the tidying a process was now and then aborted ("terminate
    called without an active exception"), for a reason that is not known.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_devices(count: int) -> None:
    """Refuse more processes than GPUs where there are GPUs.

    Raises
    ------
    UserError
    """
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and count > gpus:
        raise UserError(
            f"The profile's `processes` is {count}, but this machine has {gpus} GPU(s), of which "
            f"every process needs one. Set processes to {gpus} or less."
        )


def report(error: UserError) -> None:
    """Tell the user, and the process that launched this one, what went wrong."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if path := os.environ.get(ERROR_FILE):
        write_json(path, str(error))


def launch(command: Sequence[str], count: int, threads: int = 1, show: bool = True) -> None:
    """Run ``python <command>`` in `count` processes under torchrun, from the project's root.

    Its output goes to this process's standard error as it comes, so that a notebook shows it too.
    When this process ends, so do they.

    Raises
    ------
    UserError
        One that a process reported.
    RuntimeError
        When they ended in any other error; with the end of their output.
    """
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            ERROR_FILE: str(error_file),
        }
        # all on this machine: no name has to be looked up
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        child = subprocess.Popen(
            [sys.executable, *torchrun, "--nproc-per-node", str(count), *command],
            stdin=subprocess.PIPE,  # closes when this process ends, see _end_with_launcher
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )
        try:
            output = _pass_on(child, show)
            code = child.wait()
        except BaseException:  # an interrupt too: nothing may go on behind the user's back
            _end(child)
            raise
        if error_file.is_file():
            raise UserError(read_json(error_file))
        if code:
            raise RuntimeError(f"Training in {count} processes ended with code {code}:\n{output}")


def _pass_on(child: subprocess.Popen, show: bool) -> str:
    """Show the output piece by piece (progress bars end no line); give back the end of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    kept = ""
    while piece := os.read(child.stdout.fileno(), 4096):
        text = decoder.decode(piece)
        kept = (kept + text)[-KEPT_OUTPUT:]
        if show:
            sys.stderr.write(text)
            sys.stderr.flush()
    return kept


def _end(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()


def _end_with_launcher() -> None:
    """End when the launching process does, however it ended: its end closes our standard input."""
    while os.read(0, 1):
        pass
    os._exit(1)
