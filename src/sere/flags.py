"""The flags of every verb. Imports neither torch nor vllm."""

from __future__ import annotations

import argparse

from sere.typed import above_0, at_least_0, positive, rate, share, threshold, whole

# `sere.similarity.measures.METHODS`, named here because importing that takes torch.
_METHODS = ("frobenius", "cosine", "directed", "cka-linear", "cka-rbf", "cka-polynomial")
_NULL_MODELS = ("weights", "random")  # `sere.calibration.null_models.METHODS`
_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")  # vLLM's `ModelDType`
_SHAPES = (  # `sere.speed.shapes.SHAPES`
    "qwen1.5-moe-a2.7b",
    "deepseek-v2-lite",
    "qwen3-30b-a3b",
    "gpt-oss-120b",
    "qwen3-235b-a22b",
    "deepseek-v3",
)


def calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help='a folder, a hub name, or "demo" (the bundled model)')
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="text or chats: .txt, .md, .jsonl, .json (also .gz), .parquet",
    )
    parser.add_argument("-o", "--output", default="table.safetensors", metavar="FILE")
    parser.add_argument(
        "--method",
        default="frobenius",
        choices=(*_METHODS, *_NULL_MODELS),
        help="how to measure similarity; weights and random need no text, to compare with",
    )
    parser.add_argument("--samples", type=positive, default=400, help="texts to draw")
    parser.add_argument("--length", type=positive, default=128, help="tokens per text, at most")
    parser.add_argument("--batch", type=positive, default=16, help="texts per forward pass")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument(
        "--allow-fewer", action="store_true", help="accept a corpus that is shorter"
    )
    parser.add_argument(
        "--until-stable",
        type=share,
        metavar="SHARE",
        help="stop early once every layer would choose this share of its replacements again",
    )
    _stream(parser, "; resumable")
    parser.add_argument(
        "--engine",
        choices=("vllm",),
        help="let vLLM run the experts: its kernels, quantisations and devices; its own arguments "
        "follow behind -- (sere calibrate MODEL --engine vllm -- --tensor-parallel-size 2)",
    )
    parser.set_defaults(engine_arguments=[])
    parser.add_argument(
        "--maps",
        type=positive,
        metavar="RANK",
        help="fit linear maps of at most this rank too, into FILE.maps (fill: linear)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="also replace a table in which `sere tune` left a policy",
    )


def _stream(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help=f"hold one decoder layer in memory at a time{more} (default: if it has to be)",
    )


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", help="a table made by `sere calibrate`")
    parser.add_argument(
        "--rho", type=threshold, help="threshold to judge the layers by (default: 0.3)"
    )
    parser.add_argument("--plot", metavar="PNG", help="write heatmaps of all layers")
    parser.add_argument("--compare", metavar="TABLE", help="another table of the same model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", default="out", metavar="FOLDER", help="table, results, pictures go here"
    )
    parser.add_argument("--prompts", type=positive, default=640, help="held-out prompts")
    parser.add_argument("--batch", type=positive, default=32, help="requests decoded together")
    parser.add_argument("--method", default="frobenius", choices=_METHODS)
    parser.add_argument(
        "--speed",
        dest="shape",
        metavar="MODEL",
        default="qwen3-30b-a3b",
        help="whose speed to measure: a shape, of which a layer is served (8 on a GPU), or a model",
    )
    parser.add_argument("--seed", type=whole, default=0)


def evaluate(parser: argparse.ArgumentParser) -> None:
    _passage_flags(parser, "evaluation.json")
    parser.add_argument(
        "--engine",
        action="store_true",
        help="let the real vLLM engine write, and compare what it writes",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="hand over to lm-evaluation-harness: names of its tasks, or of --task-folder's",
    )
    _stream(parser)
    parser.add_argument("--task-folder", metavar="FOLDER", help="tasks of your own (YAML files)")
    parser.add_argument(
        "--backend", choices=("vllm", "hf"), help="what --tasks runs on (default: vllm)"
    )
    parser.add_argument("--limit", type=positive, help="examples of each task, at most")
    parser.add_argument(
        "--fewshot",
        type=whole,
        metavar="N",
        help="solved examples in each prompt (default: each task's own)",
    )
    _switch(parser, "--chat", "prompts go through the model's chat template")
    _switch(
        parser, "--allow-unsafe-code", "run programs that the model writes (HumanEval, MBPP), here"
    )
    _switch(parser, "--score-as-decode", "tokens of given answers are decode steps (--backend hf)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the vLLM engine (default: the model's own)"
    )
    parser.add_argument(
        "--policy",
        dest="policies",
        action="append",
        metavar="JSON",
        help='e.g. {"tau": 0.02}, {"S": 1, "rho": 0.5, "name": "mine"}, {"rival": "oea", "k0": 1} '
        '(no rivals with --engine and --tasks), or the word tuned; in one pass also "table": '
        '"other.table"; may be repeated (default: S=2, S=1, and, if the table was made from text, '
        "S=2 tau=0.02 and S=1 tau=0.1)",
    )


def tune(parser: argparse.ArgumentParser) -> None:
    _passage_flags(parser, "tuning.json", smallest=2)
    _stream(parser)
    parser.add_argument(
        "--budget",
        default="kl=0.01",
        metavar="NAME=LOSS",
        help="kl (nats per token), top1 or exact_match (shares lost)",
    )
    parser.add_argument(
        "--per-layer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also look for settings of their own for each layer",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it would take, in time and memory"
    )
    parser.add_argument(
        "--bench",
        metavar="FILE",
        help="what `sere bench` measured of this model where you serve: time is what it says "
        "(default: what the next four say)",
    )
    parser.add_argument(
        "--bandwidth",
        type=above_0,
        metavar="GB/s",
        help="of the memory to serve from (default: an H100's 3350)",
    )
    parser.add_argument(
        "--expert-mb",
        type=above_0,
        metavar="MB",
        help="size of one expert as it is served (default: this model's in bf16)",
    )
    parser.add_argument(
        "--tflops",
        type=above_0,
        help="that the expert kernels reach where you serve (default: 400)",
    )
    parser.add_argument(
        "--route-us",
        type=at_least_0,
        metavar="US",
        help="what re-routing adds to a layer (default: 5, about a launch in a CUDA graph)",
    )


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a folder, a hub name, demo, or a shape: " + ", ".join(_SHAPES)
    )
    parser.add_argument("table", nargs="?", help="its table (default: beside it; shapes: random)")
    parser.add_argument(
        "--policy",
        dest="policies",
        action="append",
        metavar="JSON",
        help='e.g. {"S": 1}, {"tau": 0.05}, or the word tuned; may be repeated '
        "(default: S=2 and S=1)",
    )
    _batch_flag(parser)
    parser.add_argument("--input-len", type=positive, default=128, help="tokens of a prompt")
    parser.add_argument("--output-len", type=positive, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=positive, default=5, help="measured, after a warm-up")
    parser.add_argument(
        "--rate",
        dest="rates",
        type=rate,
        action="append",
        metavar="R",
        help="measure a server instead, with vLLM's load generator at R requests per second "
        "(inf: all at once); may be repeated",
    )
    parser.add_argument("--requests", type=positive, default=100, help="at each --rate")
    parser.add_argument(
        "--against",
        choices=("off", "stock"),
        help="off: the same engine with re-routing off. stock: an engine without the plug-in, in a "
        "process of its own; processes take turns, a round is a pair (default: off, unless stock "
        "vLLM would take another expert kernel)",
    )
    parser.add_argument("--layers", type=positive, help="cut a shape to so many layers")
    parser.add_argument(
        "--skew",
        type=at_least_0,
        default=0.0,
        help="load a shape's experts as rank^-SKEW (0: alike)",
    )
    parser.add_argument(
        "--trace", metavar="TABLE", help="load a shape's experts as this table has recorded"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the engine (default: float32 on CPUs, else bfloat16)"
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("-o", "--output", default="bench.json", metavar="FILE")


def _passage_flags(parser: argparse.ArgumentParser, output: str, smallest: int = 1) -> None:
    parser.add_argument("model", help='a folder, a hub name, or "demo" (the bundled model)')
    parser.add_argument("table", help="its table, made by `sere calibrate`")
    _batch_flag(parser, smallest)
    parser.add_argument(
        "--data", metavar="FILE", help='text as for calibrate, or {"prompt", "answer"} lines'
    )
    parser.add_argument("-o", "--output", default=output, metavar="FILE")
    parser.add_argument("--samples", type=positive, help="passages, at most (default: 512)")
    parser.add_argument("--prompt", type=positive, help="tokens a text begins with (default: 64)")
    parser.add_argument("--length", type=positive, help="tokens of a text to decode (default: 64)")
    parser.add_argument("--seed", type=whole, default=0)


def _switch(parser: argparse.ArgumentParser, name: str, meaning: str) -> None:
    """A flag that is None unless given, so that it can be refused where nobody reads it."""
    parser.add_argument(name, action="store_true", default=None, help=meaning)


def _batch_flag(parser: argparse.ArgumentParser, smallest: int = 1) -> None:
    parser.add_argument(
        "--batch",
        dest="batches",
        type=positive,
        action="append",
        metavar="B",
        help=f"requests decoded together; may be repeated (default: {smallest}, 8 and 32)",
    )


def top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="of a vLLM server, e.g. localhost:8000")
    parser.add_argument("--interval", type=above_0, default=2.0, metavar="S", help="seconds")
    parser.add_argument("--once", action="store_true", help="print one picture, since the start")
    parser.add_argument("--json", action="store_true", help="print one reading as JSON")


def switch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="of a vLLM server, e.g. localhost:8000")
    parser.add_argument(
        "to",
        nargs="?",
        metavar="off|on|JSON",
        help="stock routing, what the server began with, or a policy; leave out to be told",
    )
    parser.add_argument(
        "--key-file", metavar="FILE", help="holds the server's key; else SERE_ADMIN_KEY does"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="results of any verb and of `vllm bench serve`: JSON files and tables",
    )
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE")


def doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        help="also check this model (folder, hub name, demo); or the URL of a running server",
    )
    parser.add_argument(
        "table",
        nargs="?",
        help="... and that this table fits and would be served; or auto: that it can make its own",
    )
    parser.add_argument(
        "--settings",
        metavar="JSON",
        help='... and that this would be accepted behind "sere", beside the table: \'{"S": 1}\', '
        'or in its place: \'{"auto": {"data": "text.jsonl"}}\'',
    )
    parser.add_argument(
        "--bench",
        metavar="FILE",
        help="a result of `sere bench` on this machine: does decoding reach its bandwidth?",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
