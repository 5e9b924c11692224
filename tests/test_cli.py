"""The command line: quick help, one-line errors, exit codes that scripts can rely on."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest

import sere.calibration.calibrate
from sere import verbs
from sere.cli import VERBS, main, parser
from sere.similarity.measures import METHODS
from sere.table import Table, TableError

HELP = [["--help"], *([verb, "--help"] for verb in VERBS)]


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_help_loads_no_heavy_library(argv: list[str]) -> None:
    script = (
        "import sys\n"
        "from sere.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'safetensors', 'tqdm'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert "usage: sere" in done.stdout, done.stderr
    assert done.stdout.endswith("loaded: []\n")


def test_help_starts_quickly() -> None:
    """CPU time beyond bare Python, best of five: what a busy machine adds does not count."""

    def cpu_seconds(*arguments: str) -> float:
        def once() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return min(once() for _ in range(5))

    assert cpu_seconds("-m", "sere", "calibrate", "--help") - cpu_seconds("-c", "") < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_exactly_its_flags(verb: str) -> None:
    """A flag that nobody reads, or an argument that no flag gives, would fail only when run."""
    needed = {
        "calibrate": ["m"],
        "inspect": ["t"],
        "evaluate": ["m", "t"],
        "tune": ["m", "t"],
        "bench": ["m"],
        "top": ["u"],
        "switch": ["u"],
        "report": ["d"],
    }
    required = needed.get(verb, [])
    given = vars(parser().parse_args([verb, *required]))
    given.pop("verb")
    given.pop("force", None)  # read by `main`, as is the next
    given.pop("debug")
    signature(getattr(verbs, verb)).bind(**given)
    module, function = VERBS[verb][2].split(":")
    assert (module, function) == ("sere.verbs", verb)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["inspect", "absent.safetensors"], "absent.safetensors: no such table"),
        (
            ["inspect", "."],
            ".: a folder, in which there is no table; make one with `sere calibrate",
        ),
        (["calibrate", "absent"], "--data FILE is needed"),
        (["calibrate", "./absent"], "./absent: no such folder"),
        (["top", "127.0.0.1:9"], "http://127.0.0.1:9/metrics cannot be read"),
        (["switch", "127.0.0.1:9", "off", "--key-file", "absent"], "absent: no key can be read"),
        (["switch", "127.0.0.1:9", "off"], "127.0.0.1:9/sere/policy cannot be reached"),
        (["switch", "127.0.0.1:9", "of"], "of: expected off, on or a policy"),
        (["switch", "127.0.0.1:9", "of"], "did you mean off?"),
        (["calibrate", "absent", "--data", "absent.txt"], "absent.txt: no such file"),
        (["calibrate", "demo", "-o", "absent/t.safetensors"], "absent does not exist"),
    ],
)
def test_an_expected_failure_is_one_line_and_status_1(
    argv: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("sere: error: ")
    assert error.count("\n") == 1
    assert complaint in error


def test_a_shell_sees_the_status_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sere", "inspect", str(tmp_path / "absent.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("sere: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("cli.main(['inspect', 'table'])", 141),
        ("cli.main(['top', 'url'])", 1),
    ],
    ids=["a verb", "another pipe"],
)
def test_who_reads_no_further_is_not_told_of_it(program: str, status: int) -> None:
    """As `sere inspect T | head`; a pipe that breaks elsewhere is an error."""
    script = f"""
import sys
from sere import cli, verbs
def breaks(**_): raise BrokenPipeError(32, "of a child")
def prints(**_): print("x" * 100_000)
verbs.inspect, verbs.top = prints, breaks
sys.exit({program})
"""
    read, write = os.pipe()
    if status == 141:
        os.close(read)
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == status
    assert (b"of a child" in done.stderr) if status == 1 else done.stderr == b""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such table"):
        main(["inspect", str(tmp_path / "absent"), "--debug"])


def test_a_death_in_native_code_says_what_was_being_done(tmp_path: Path) -> None:
    """Such as an instruction that this processor has not; the shell alone would only name it."""
    script = (
        "import os, signal, sys\n"
        "from sere import cli, verbs\n"
        "def attention(**_): os.kill(os.getpid(), signal.SIGILL)\n"
        "verbs.inspect = attention\n"
        "cli.main(['inspect', 'table'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGILL
    assert "Illegal instruction" in done.stderr and "in attention" in done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "sere: error: expected a verb: calibrate, inspect, demo,"),
        ("dance", "sere: error: dance: no such verb; there are calibrate,"),
        ("evalute m t", "sere: error: evalute: no such verb; did you mean evaluate?"),
        ("inspect ''", "sere: error: an argument is empty: is a variable of the shell not set?"),
        ("inspect", "sere inspect: error: the following arguments are required: table"),
        ("inspect t u", "sere inspect: error: u: expected no further argument"),
        ("inspect t --json=no", "--json: takes no value, and was given 'no'"),
        ("inspect t --rho high", "--rho high: expected a number >= 0"),
        ("inspect t --rho=-1", "--rho -1: expected a number >= 0"),
        ("inspect t --rho nan", "--rho nan: expected a number >= 0"),
        ("calibrate m --methd=cosine", "--methd=cosine: no such flag; did you mean --method?"),
        ("calibrate m --xyz", "--xyz: no such flag (see sere calibrate --help)"),
        ("calibrate m --data", "sere calibrate: error: --data: expected one argument"),
        ("demo --method cosin", "--method cosin: expected one of frobenius, cosine, directed,"),
        ("demo --method cosin", "did you mean cosine? (see sere demo --help)"),
        ("bench m --dtype float99", "--dtype float99: expected one of auto, half, float16,"),
        ("calibrate m --samples 0", "--samples 0: expected a whole number >= 1"),
        ("calibrate m --batch many", "--batch many: expected a whole number >= 1"),
        ("tune m t --budget kl=1 --batch 8,32", "of several one behind each flag"),
    ],
    ids=str,
)
def test_what_is_mistyped_is_said_in_one_line_and_is_status_2(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(shlex.split(typed))
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert said in error and error.endswith("--help)\n")


@pytest.mark.parametrize("verb", ["calibrate", "demo"])
def test_every_measure_is_offered(verb: str) -> None:
    required = ["m"] if verb == "calibrate" else []
    for method in METHODS:
        assert parser().parse_args([verb, *required, "--method", method]).method == method


@pytest.mark.parametrize("verb", ["evaluate", "tune", "doctor", "bench"])
def test_a_table_in_the_models_place_is_called_so(
    verb: str, table_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--budget", "kl=0.01"] if verb == "tune" else []
    with pytest.raises(SystemExit):
        main([verb, str(table_path), "demo", *more])
    said = capsys.readouterr().err
    assert f"{table_path} is a table, and the model comes first: sere {verb} MODEL TABLE" in said


def test_calibrate_then_inspect(
    model_dir: Path, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, png = tmp_path / "t.safetensors", tmp_path / "t.png"
    flags = ["--data", str(corpus_file), "--samples", "50", "--length", "8", "--method", "cosine"]
    assert main(["calibrate", str(model_dir), "-o", str(output), *flags]) == 1
    assert "ask for 20 (samples), take fewer (--allow-fewer" in capsys.readouterr().err
    assert main(["calibrate", str(model_dir), "-o", str(output), *flags, "--allow-fewer"]) == 0
    assert "2 layers, E=8, K=2" in capsys.readouterr().out
    table = Table.load(output)
    assert (table.method, table.provenance["length"]) == ("cosine", 8)

    assert main(["inspect", str(output), "--json", "--rho", "1.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [layer["critical_fraction"] for layer in told["layers"]] == [1, 1]
    assert (told["table"], told["method"], told["policy"]) == (str(output), "cosine", None)
    assert (told["fingerprint"]["E"], told["provenance"]["length"]) == (8, 8)
    assert main(["inspect", str(output), "--compare", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tables"] == [str(output)] * 2 and len(told["layers"]) == 2
    assert not told["differences"]
    arguments = ["inspect", str(output), "--rho", "0"]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--plot", str(png)]
    assert main(arguments) == 0
    assert "critical at rho=0" in capsys.readouterr().out
    assert png.exists() == ("--plot" in arguments)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--", "--max-model-len", "64"], "engine arguments go with --engine vllm"),
        (["--engine", "vllm", "--batch", "8", "--no-stream"], "--batch, --stream: not with"),
        (["--engine", "vllm", "--method", "cka-rbf"], "an engine measures frobenius, cosine"),
    ],
    ids=str,
)
def test_what_only_one_of_both_ways_to_calibrate_can_do_is_refused(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "demo", "-o", str(tmp_path / "t.table"), *more]) == 1
    assert said in capsys.readouterr().err


def test_compared_tables_of_two_models_are_said_to_be(
    make_table: Callable[..., Table], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("one", "same", "other")]
    for path, router in zip(paths, ("a" * 64, "a" * 64, "b" * 64), strict=True):
        make_table(router_hash=router).save(path)
    assert main(["inspect", paths[0], "--compare", paths[1]]) == 0
    assert capsys.readouterr().err == ""
    assert main(["inspect", paths[0], "--compare", paths[2]]) == 0
    assert "two models, which differ in router weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    [
        "bandwidth=0",
        "bandwidth=nan",
        "bandwidth=-5",
        "tflops=0",
        "expert-mb=-1",
        "expert-mb=0",
        "route-us=-5",
        "route-us=inf",
        "seed=-1",
        "samples=0",
        "bandwidth=1e308",
        "length=99999999999",
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_loaded(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: a ZeroDivisionError, or a choice stored in the table."""
    with pytest.raises(SystemExit) as refused:
        main(["tune", "absent", "absent", f"--{flag}"])
    assert refused.value.code == 2
    assert f"{flag.split('=')[1]}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["calibrate", "m", "--until-stable=90"],
        ["calibrate", "m", f"--samples={'9' * 5000}"],
        ["bench", "m", "--rate=0"],
        ["bench", "m", "--skew=nan"],
        ["top", "u", "--interval=0"],
    ],
    ids=lambda argv: argv[-1][:20],
)
def test_numbers_of_other_verbs_have_ranges_too(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)


def test_ctrl_c_while_something_is_imported(tmp_path: Path) -> None:
    """What is interrupted may turn it into an error of its own, as numpy does."""
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, os, signal\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest, **more):\n"
        "    if name == 'torch':\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            while True: pass\n"
        "        except BaseException: raise AttributeError('half imported')\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = slow\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "sere", "calibrate", "demo", "-o", str(tmp_path / "t")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sere.calibration.calibrate, "calibrate", interrupted)
    assert main(["calibrate", "m"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(sere.calibration.calibrate, "calibrate", broken)
    with pytest.raises(AssertionError):
        main(["calibrate", "m"])


def test_tune_searches_where_there_is_something_to_gain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is alone keeps its experts: not at batch 1, unless it is asked for."""
    searched: list[list[int]] = []
    monkeypatch.setattr("sere.tuning.tune.run", lambda *_, batches, **__: searched.append(batches))
    assert main(["tune", "demo", "t"]) == main(["tune", "demo", "t", "--batch", "1"]) == 0
    assert searched == [[2, 8, 32], [1]]
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "default: 2, 8 and 32" in " ".join(capsys.readouterr().out.split())
