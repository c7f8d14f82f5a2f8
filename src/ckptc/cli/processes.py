"""Several processes that run one plan: their options, and what they say to each other through."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from ckptc.diagnostics import fail

if TYPE_CHECKING:
    from ckptc.run.coordinator import Alone

_TOGETHER = ("coordinator", "num_processes", "process_id")


def peers(args: argparse.Namespace) -> Alone:
    """The other processes of the run; none where no option speaks of any. JAX starts in the background.

    Raises InputError `which-process` when the options are not enough, contradict each other, or name no place.
    """
    from ckptc.run.coordinator import WAIT, Alone, Meeting, Peers

    given = [name for name in _TOGETHER if getattr(args, name) is not None]
    wait = args.wait or WAIT
    if args.distributed:
        if given:
            raise _fault(f"{_option(given[0])} goes without --distributed")
        return Peers(Meeting(wait=wait))
    if not given:
        if args.wait:
            raise _fault("--wait goes with --coordinator or --distributed")
        return Alone()
    missing = [name for name in _TOGETHER if name not in given]
    if missing:
        raise _fault(f"{_option(missing[0])} is missing")
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/]+):([0-9]{1,5})", args.coordinator)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise _fault(f"--coordinator {args.coordinator} is not HOST:PORT")
    if args.process_id >= args.num_processes:
        raise _fault(f"of {args.num_processes} processes, the last is --process-id {args.num_processes - 1}")
    return Peers(Meeting(args.coordinator, args.num_processes, args.process_id, wait))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fault(message: str) -> Exception:
    help = "--coordinator HOST:PORT --num-processes N --process-id I, or --distributed on a cluster that JAX knows"
    return fail("which-process", message, help=help)
