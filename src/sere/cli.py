"""The command line: verbs and their flags. A verb's module is imported only when it runs, so that
help needs neither torch nor vllm."""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from sere import __version__, files, flags
from sere.checks import nearest
from sere.extras import with_remedy
from sere.typed import Parser

# argparse keeps what the verb's function does not take under these names.
_VERB = "verb"
_WRITES = ("calibrate", "inspect", "demo", "evaluate", "tune", "bench", "report")


# verb: (what it does, flags, "module:function")
VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str]] = {
    "calibrate": (
        "measure how alike a model's experts are; write a table",
        flags.calibrate,
        "sere.verbs:calibrate",
    ),
    "inspect": ("show what is in a table, with warnings", flags.inspect, "sere.verbs:inspect"),
    "demo": (
        "calibrate the bundled model, serve it with vLLM, show gain and cost",
        flags.demo,
        "sere.verbs:demo",
    ),
    "evaluate": (
        "measure quality and active experts of policies beside stock routing",
        flags.evaluate,
        "sere.verbs:evaluate",
    ),
    "tune": (
        "find the fastest settings within a budget; store them in the table",
        flags.tune,
        "sere.verbs:tune",
    ),
    "bench": (
        "measure decode speed in vLLM, stock and re-routed, beside the roofline",
        flags.bench,
        "sere.verbs:bench",
    ),
    "report": ("show a folder of results as one HTML page", flags.report, "sere.verbs:report"),
    "top": ("show what re-routing does in a running server, live", flags.top, "sere.verbs:top"),
    "switch": (
        "switch re-routing off, on or to another policy in a running server",
        flags.switch,
        "sere.verbs:switch",
    ),
    "doctor": (
        "tell whether re-routing can take effect here, and what hinders it",
        flags.doctor,
        "sere.verbs:doctor",
    ),
}


_WORDS = """
A decode step has a row for each request; a row chooses K of a layer's E experts, in K slots.
Primary experts are every row's first S choices. A slot of another, a secondary expert, moves to
the primary that is most like it, and an expert without slots is not read. Critical is a secondary
expert that no primary is like enough to: it stays. Rows that may be re-routed are fast; prompts,
and requests that ask for it, are exact. rho and tau say what is like enough.
"""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, but not that there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> Parser:
    """The parser of all verbs."""
    top = Parser(
        prog="sere",
        description="Similarity-based expert re-routing for MoE models in vLLM.",
        epilog=_WORDS,
    )
    top.add_argument("--version", action="version", version=f"sere {__version__}")
    verbs = top.add_subparsers(dest=_VERB, metavar="VERB")
    for name, (summary, add_flags, _) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary.capitalize() + ".",
            formatter_class=_Formatter,
        )
        add_flags(verb)
        if name in _WRITES:
            verb.add_argument(
                "--force",
                action="store_true",
                help="replace outputs that are none of sere's, or results of other settings",
            )
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 1 with a message on an expected failure, 130 on Ctrl-C, 141 where
    nobody reads on, as behind `| head`."""
    try:
        return _run(argv)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 128 + signal.SIGPIPE


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that was closed; it is other pipes that break, too."""
    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
        return bool(asked.poll(0))
    except (OSError, ValueError):  # no file, as in notebooks
        return False


def _run(argv: Sequence[str] | None) -> int:
    _say_what_dies()
    with _interruptible() as interrupted:
        own, for_engine = _split(sys.argv[1:] if argv is None else argv)
        arguments = _parsed(own)
        if for_engine:
            arguments["engine_arguments"] = for_engine
        module, function = VERBS[arguments.pop(_VERB)][2].split(":")
        # Threads of a team that spin while they wait take the core from a neighbour: a busy one
        # made a calibration six times slower (issue 21).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _be_brief_in_logs()
        debug = arguments.pop("debug")
        try:
            files.FORCE.set(arguments.pop("force", False))
            status = getattr(import_module(module), function)(**arguments)
            sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:
            if interrupted() or isinstance(error, KeyboardInterrupt):
                print(_interrupted(arguments.get("output")), file=sys.stderr)
                return 130
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                raise
            if debug or not isinstance(error, ValueError | OSError | ImportError | RuntimeError):
                raise
            said = with_remedy(error) if isinstance(error, ImportError) else files.plainly(error)
            print(f"sere: error: {said}", file=sys.stderr)
            return 1
    return int(status or 0)


def _parsed(argv: Sequence[str]) -> dict[str, Any]:
    """The verb and its arguments. Ends with a sentence and status 2 where they cannot be meant."""
    top = parser()
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(VERBS)}"
        top.error(f"{verb}: no such verb; {hint}")
    arguments = vars(top.parse_args(argv))
    if verb is None:
        top.error(f"expected a verb: {', '.join(VERBS)}")
    if (model := arguments.get("model")) and arguments.get("table") and _is_table(model):
        top.error(f"{model} is a table, and the model comes first: sere {verb} MODEL TABLE")
    return arguments


def _is_table(name: str) -> bool:
    with suppress(OSError, ValueError):
        return files.is_file(path := Path(name)) and files.KINDS["table"](path)
    return False


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those of an engine, which `sere calibrate` takes behind --."""
    if "--" not in argv or argv[0] != "calibrate":
        return list(argv), []
    end = argv.index("--")
    return list(argv[:end]), list(argv[end + 1 :])


def _say_what_dies() -> None:
    """A process that dies in native code, here or in an engine's process, says by which signal, and
    what it was doing; Python alone would say nothing."""
    with suppress(AttributeError, ValueError, OSError):  # stderr is no file, as in notebooks
        faulthandler.enable()
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")


def _be_brief_in_logs() -> None:
    """Progress bars that are no terminal's: none of what is over soon, and a line now and then."""
    with suppress(AttributeError, ValueError, OSError):
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DELAY", "2")
            os.environ.setdefault("TQDM_MININTERVAL", "10")


def _interrupted(output: str | None) -> str:
    kept = output and files.unfinished(output)
    if kept and kept.exists():
        return f"sere: interrupted; the same command goes on from what {kept} keeps"
    return "sere: interrupted; no output was written, and the same command begins anew"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Remembers a Ctrl-C: what it interrupts may turn it into an error of its own, as numpy does
    while it is imported."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGINT, before)
