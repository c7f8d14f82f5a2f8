"""`ckptc`: the parser, and what each exit code means.

    0  done
    1  the input is at fault: a mapping, a checkpoint, a plan, an output that exists; or `diff` found differences
    2  the command line is at fault, or ckptc is
  128 + n  ended by signal n: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP; what is done is kept

Commands import what they need when they run: `--help` loads none of it.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import ckptc
from ckptc.cli import arguments, diff, explain, export, formats, plan, prove, system, targets
from ckptc.diagnostics import InputError, fail

WHERE = "CKPTC_TRACEBACK=1 shows where"
DONE, INPUT_AT_FAULT, USAGE_OR_INTERNAL = 0, 1, 2

EPILOG = """\
examples:
  ckptc models                                        what can be converted
  ckptc compile --model gemma2-2b                     what would happen, from the model's shipped numbers
  ckptc compile --model gemma2-2b --source DIR -o plan.json
  ckptc run plan.json --output OUT                    exactly that, into OUT/0/items
  ckptc convert --model gemma2-2b --source DIR --output OUT
  ckptc verify plan.json --output OUT                 each bit, against the source
  ckptc export --source OUT --output HF               and back, as safetensors
  ckptc diff HF DIR                                   what differs, and by how much
  ckptc prove --model gemma2-2b --setup ENVS          that both models compute the same
  ckptc plan show plan.json --html plan.html          a page to explore it
  ckptc explain gemma2-2b '*q_proj*'                  what becomes of a tensor
  ckptc explain shape-mismatch                        what an error's code means, and what to do

exit codes: 0 done; 1 the input is at fault, or diff found differences; 2 usage or internal error;
128 + n ended by signal n, 130 by Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ckptc",
        description="The checkpoint compiler: Hugging Face safetensors to sharded Orbax checkpoints that MaxText "
        "restores.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"ckptc {ckptc.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    models = commands.add_parser(
        "models",
        help="list the models that can be converted, or show one",
        description="Every named model, its family, repository and layouts; with NAME, one model whole.",
    )
    models.add_argument("name", nargs="?", metavar="NAME", help="show this model: dims, rules, ops, tensors, bytes")
    models.add_argument("--mapping", metavar="FILE", help="list the models of this mapping instead of the shipped ones")
    models.add_argument(
        "--expanded",
        action="store_true",
        help="print NAME's family as explicit rules, with the reasons of what is done: a mapping that --mapping takes",
    )
    models.add_argument(
        "--target", metavar="TARGET", help="with --expanded, what the family runs as (default: maxtext)"
    )
    models.add_argument("--json", action="store_true", help="print JSON")

    compile_ = commands.add_parser(
        "compile",
        help="check a conversion and write its plan",
        description="Proves a mapping against a checkpoint's headers, or the model's shipped numbers, and says what a "
        "run would do. Reads no weights.",
    )
    arguments.compilation(compile_)
    export.compilation_too(compile_)
    compile_.add_argument("-o", "--output", metavar="PLAN", dest="plan_file", help="write the plan to this file")
    shown = compile_.add_mutually_exclusive_group()
    shown.add_argument("--dump-plan", action="store_true", help="print the plan as JSON on stdout, and nothing else")
    shown.add_argument("--json", action="store_true", help="print the summary as JSON")
    compile_.add_argument(
        "--unproved",
        action="store_true",
        help="list instead what neither headers nor the target can prove: parts of one size, square matrices, tensors of "
        "one shape; running the model shows whether they are right",
    )
    compile_.add_argument(
        "--num-processes",
        type=arguments.positive,
        metavar="N",
        help="also say how evenly N processes would share the work, and how it would scale up to N",
    )
    compile_.add_argument("--force", action="store_true", help="let -o replace a file that is not a plan")

    run = commands.add_parser(
        "run",
        help="execute a plan",
        description="Executes exactly the plan. The output appears complete or not at all.",
    )
    run.add_argument("plan", metavar="PLAN", help="a file that `ckptc compile -o` wrote")
    run.add_argument(
        "--source",
        metavar="DIR|hf://…",
        help="where the checkpoint is (default: the commit on the Hub that the plan names, or where this machine last "
        "compiled it from)",
    )
    run.add_argument(
        "--config-from",
        metavar="DIR",
        help="of an export: the directory with the files to copy (default: as for --source)",
    )
    run.add_argument(
        "--fill-from",
        metavar="DIR|hf://…",
        help="of an export: the checkpoint that tensors are copied from (default: as for --source)",
    )
    run.add_argument("--mapping", metavar="FILE", help="for --verify: the plan's mapping, if it is not a shipped one")
    arguments.execution(run)
    arguments.together(run)

    convert = commands.add_parser(
        "convert", help="compile and run in one", description="Compiles, then runs, with the options of both."
    )
    arguments.compilation(convert, source="the model's own repository on the Hub")
    arguments.execution(convert)
    arguments.together(convert)

    export.add_export(commands)
    diff.add_diff(commands)

    verify = commands.add_parser(
        "verify",
        help="read a checkpoint back and compare",
        description="With a plan, every array is compared, bit by bit, with what its source gives by the mapping's "
        "ops, taken one after the other. With a directory, with the checksums that were noted when it was written.",
    )
    verify.add_argument("target", metavar="PLAN|DIR", help="a plan, or the output of a run")
    verify.add_argument("--output", metavar="DIR", help="with a plan: the checkpoint, as `ckptc run` was given it")
    verify.add_argument(
        "--source", metavar="DIR", help="with a plan: its source (default: where this machine last compiled it from)"
    )
    verify.add_argument("--mapping", metavar="FILE", help="with a plan: its mapping, if it is not a shipped one")
    verify.add_argument(
        "--jobs", type=arguments.positive, metavar="N", help="threads at most (default: as many as there are cores)"
    )
    verify.add_argument("--json", action="store_true", help="print what was verified as JSON")
    verify.add_argument("--quiet", action="store_true", help="show no progress")
    prove.add_prove(commands)
    targets.add_targets(commands)
    explain.add_explain(commands)
    plan.add_plan(commands)
    for command in commands.choices.values():
        formats.add_format(command)
    return top


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line of this process."""
    system.open_closed_streams()
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. A usage error exits with 2 from within argparse."""
    with system.streams() as (out, _), system.stopping():
        form = argparse.Namespace(format="text")
        try:
            args = _parsed(argv)
            form = args
            code = _handler(args.command)(args) or DONE
            out.flush()
            if out.error is not None and not isinstance(out.error, BrokenPipeError) and code == DONE:
                _unprinted(args, out.error)
            return code
        except BaseException as error:
            return _failed(error, form.format)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    args = top.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":  # a variable of the shell that is not set; as a path it would be the directory one is in
            top.error(f"argument {name.replace('_', '-')}: expected a value, not an empty one")
    arguments.refuse_urls(args)
    return args


def _unprinted(args: argparse.Namespace, error: OSError) -> None:
    """Raises `system-refused` where what could not be printed is all that was asked for; else only says so."""
    message = f"cannot write to standard output: {error.strerror}"
    asked = args.command in ("models", "explain") or getattr(args, "dump_plan", False)
    if asked or (args.command == "compile" and not args.plan_file):
        raise fail("system-refused", message, help="what was printed is not whole: make room, and give it again")
    print(f"warning: {message}; all else is done", file=sys.stderr)


def _failed(error: BaseException, form: str) -> int:
    """Says what ended a command, and returns its exit code."""
    if isinstance(error, InputError):
        return _refused(error, form)
    if isinstance(error, KeyboardInterrupt):
        stopped = error if isinstance(error, system.Stopped) else system.Stopped(signal.SIGINT)
        print(stopped.words, file=sys.stderr)
        return stopped.code
    if not isinstance(error, Exception):
        raise error
    if os.environ.get("CKPTC_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, OSError):  # a name too long, a lost mount: where no stage has more to say of it
        help = f"check the path and its permissions; {WHERE}"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            help = f"allow more open files (`ulimit -n`), or use fewer --jobs; {WHERE}"
        return _refused(fail("system-refused", f"the system refused: {error}", help=help), form)
    if isinstance(error, MemoryError) or _no_memory(error):
        help = "use less --memory, or fewer --jobs"
        return _refused(fail("out-of-memory", "the system has no more memory for this command", help=help), form)
    name = type(error).__name__
    print(f"internal error: {name}: {error}\nThis is a bug in ckptc. {WHERE}.", file=sys.stderr)
    return USAGE_OR_INTERNAL


def _no_memory(error: Exception) -> bool:
    """Whether libraries could not be loaded, or threads not begun, for want of memory."""
    said = str(error)
    unmapped = "failed to map segment" in said or "annot allocate memory" in said  # dlopen's words
    return (isinstance(error, ImportError) and unmapped) or said == "can't start new thread"


def _handler(command: str) -> Callable[[argparse.Namespace], int | None]:
    if command == "export":  # which loads the others' libraries while another process reads
        return export.export
    from ckptc.cli import commands, verify

    return {
        "models": commands.models,
        "compile": commands.compile_,
        "run": commands.run,
        "convert": commands.convert,
        "diff": diff.diff,
        "verify": verify.verify,
        "prove": prove.prove,
        "targets": targets.targets,
        "explain": explain.explain,
        "plan": plan.plan,
    }[command]


def _refused(error: InputError, form: str) -> int:
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(formats.formatted(error.diagnostics, form, color), file=sys.stderr)
    return INPUT_AT_FAULT
