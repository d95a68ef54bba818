"""Options that several commands share, one place for each flag: name, help, panel, variable.

Every option can also be set by an environment variable of the same name with the prefix ``KVQ_``
(``--outlier-fraction`` is ``KVQ_OUTLIER_FRACTION``); the command line wins.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

MODEL = "Model"
QUANTIZATION = "Quantization"
DATA = "Data"
PROMPT = "Prompt"
SAMPLING = "Sampling"
OUTPUT = "Output"


class Dtype(StrEnum):
    """Floating-point type that the weights are loaded in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class ValueGrain(StrEnum):
    """What shares one scale and centre of the values."""

    TOKEN = "token"
    HEAD = "head"


class Sensitivity(StrEnum):
    """Weight of a calibration point."""

    FISHER = "fisher"
    NONE = "none"


class Solver(StrEnum):
    """Solver of the codebook fit."""

    EXACT = "exact"
    SKLEARN = "sklearn"


def environment_name(flag: str) -> str:
    """``--seq-len`` to ``KVQ_SEQ_LEN``."""
    return "KVQ_" + flag.lstrip("-").split("/")[0].replace("-", "_").upper()


def option(
    *flags: str,
    panel: str,
    help: str,
    metavar: str | None = None,
    default: str | None = None,
    min: int | None = None,
    hidden: bool = False,
) -> Any:
    """Declare an option with its panel and its environment variable.

    ``default`` is what help shows as the default where the real one is decided later (None).
    """
    long = next(flag for flag in flags if flag.startswith("--"))
    return typer.Option(
        *flags,
        help=help,
        rich_help_panel=panel,
        metavar=metavar,
        min=min,
        # A hidden option is another name of one that is not: it gets no variable of its own.
        envvar=None if hidden else environment_name(long),
        show_envvar=False,
        show_default=default if default is not None else True,
        hidden=hidden,
    )


def overruled(context: typer.Context, name: str, *, by: str) -> bool:
    """Whether ``name`` comes from the environment and ``by``, its rival, from the command line."""
    mine, rival = (context.get_parameter_source(parameter) for parameter in (name, by))
    if mine is None or rival is None:
        return False
    return (mine.name, rival.name) == ("ENVIRONMENT", "COMMANDLINE")


def refuse_together(context: typer.Context, name: str, *others: str) -> None:
    """Raise a usage error where one of ``others`` is given on the command line beside ``name``."""

    def flag(parameter: str) -> str:
        return "--" + parameter.replace("_", "-")

    for other in others:
        source = context.get_parameter_source(other)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"give {flag(name)} or {flag(other)}, not both")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter comes from the command line or the environment, and is no default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def chosen_load_in(
    context: typer.Context, *, load_in_4bit: bool, load_in_8bit: bool
) -> Literal["4bit", "8bit"] | None:
    """What ``load_model`` calls ``load_in``; both flags are a usage error.

    One in the environment gives way to the other on the command line.
    """
    if load_in_4bit and load_in_8bit:
        names = ("load_in_4bit", "load_in_8bit")
        load_in_4bit = not overruled(context, names[0], by=names[1])
        load_in_8bit = not overruled(context, names[1], by=names[0])
    if load_in_4bit and load_in_8bit:
        raise typer.BadParameter("give --load-in-4bit or --load-in-8bit, not both")
    return "4bit" if load_in_4bit else "8bit" if load_in_8bit else None


def model_argument(*, help: str) -> Any:
    """Declare the positional MODEL."""
    return typer.Argument(
        help=help, metavar="MODEL", show_default=False, envvar="KVQ_MODEL", show_envvar=False
    )


# Global options, on every command.
AsJson = Annotated[
    bool, option("--json", panel=OUTPUT, help="Print one JSON object on stdout, also for errors.")
]
Quiet = Annotated[
    bool, option("-q", "--quiet", panel=OUTPUT, help="No notes and no progress; results stay.")
]
Verbose = Annotated[
    bool, option("-v", "--verbose", panel=OUTPUT, help="Also print what the libraries log.")
]
NoProgress = Annotated[bool, option("--no-progress", panel=OUTPUT, help="No progress on stderr.")]

# Model.
ModelAlias = Annotated[
    str | None, option("-m", "--model", panel=MODEL, help="Same as MODEL.", hidden=True)
]
Revision = Annotated[
    str | None,
    option(
        "--revision", panel=MODEL, metavar="REV", default="main",
        help="Branch, tag or commit of the model on the Hub.",
    ),
]  # fmt: skip
DtypeOption = Annotated[
    Dtype, option("--dtype", panel=MODEL, help="Type of the weights; auto: as they are stored.")
]
DeviceMap = Annotated[
    str | None,
    option(
        "--device-map", panel=MODEL, metavar="MAP", default="one GPU if there is one, else CPU",
        help="Where the weights go, e.g. auto, cpu, cuda:1.",
    ),
]  # fmt: skip
LoadIn4bit = Annotated[
    bool,
    option(
        "--load-in-4bit", panel=MODEL, help="Hold the weights in 4 bits (NF4), by bitsandbytes."
    ),
]
LoadIn8bit = Annotated[
    bool,
    option("--load-in-8bit", panel=MODEL, help="Hold the weights in 8 bits, by bitsandbytes."),
]
AttnImplementation = Annotated[
    str | None,
    option(
        "--attn-implementation", panel=MODEL, metavar="NAME", default="the model's own",
        help="Attention of transformers, e.g. eager, sdpa.",
    ),
]  # fmt: skip
TrustRemoteCode = Annotated[
    bool,
    option("--trust-remote-code", panel=MODEL, help="Run Python code that the model brings along."),
]

# Quantization.
Bits = Annotated[int, option("--bits", panel=QUANTIZATION, help="Bits of a code: 2, 3 or 4.")]

# Data.
TextColumn = Annotated[
    str | None,
    option("--text-column", panel=DATA, help="Column that holds the text.", default="text"),
]
BatchSize = Annotated[
    int, option("--batch-size", panel=DATA, help="Windows a forward pass.", min=1)
]
Seed = Annotated[int, option("--seed", panel=DATA, help="Chooses the windows of the text.")]

# Output.
Overwrite = Annotated[
    bool, option("--overwrite", panel=OUTPUT, help="Replace what the output folder holds.")
]


def sidecars_in_environment() -> list[str]:
    """What KVQ_SIDECAR names, cut at blanks as an option that may be given several times is."""
    return os.environ.get(environment_name("--sidecar"), "").split()


def chosen_model(argument: str | None, alias: str | None) -> str | None:
    """Return MODEL, or ``--model`` for those who are used to it; both is a usage error."""
    if argument is not None and alias is not None:
        raise typer.BadParameter("give MODEL once, not also as --model")
    return argument if argument is not None else alias
