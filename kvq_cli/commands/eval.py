"""``kvq eval``: what a quantized cache costs, in perplexity, divergence and agreement."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvq_cli.options import (
    DATA,
    OUTPUT,
    QUANTIZATION,
    AsJson,
    AttnImplementation,
    BatchSize,
    DeviceMap,
    Dtype,
    DtypeOption,
    LoadIn4bit,
    LoadIn8bit,
    ModelAlias,
    NoProgress,
    Quiet,
    Revision,
    TextColumn,
    TrustRemoteCode,
    Verbose,
    chosen_load_in,
    chosen_model,
    model_argument,
    option,
)
from kvq_cli.output import Output
from kvq_formats.errors import ConfigError

if TYPE_CHECKING:
    from kvq_evaluation.perplexity import MeasuredPath

SCHEMA = "kvq.eval/1"


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None,
        model_argument(
            help="Hub id (org/name, org/name@revision) or folder. Without it: the sidecar's model."
        ),
    ] = None,
    model_alias: ModelAlias = None,
    revision: Revision = None,
    dtype: DtypeOption = Dtype.AUTO,
    device_map: DeviceMap = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    attn_implementation: AttnImplementation = None,
    trust_remote_code: TrustRemoteCode = False,
    sidecar: Annotated[
        list[str] | None,
        option(
            "--sidecar",
            panel=QUANTIZATION,
            metavar="DIR",
            help="Sidecar: folder, file or Hub id; may be given several times.",
            default="the current sidecar",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        option(
            "--baseline",
            panel=QUANTIZATION,
            metavar="NAMES",
            help="Other methods on the same tokens, with commas between: kivi2, hadamard4, fp8.",
            default="none",
        ),
    ] = None,
    ppl: Annotated[
        str | None,
        option(
            "--ppl",
            panel=DATA,
            metavar="NAMES",
            help="Texts, with commas between: wikitext2, c4, builtin, a Hub id, or a file.",
            default="wikitext2, without --retrieval or --tasks",
        ),
    ] = None,
    retrieval: Annotated[
        str | None,
        option(
            "--retrieval",
            panel=DATA,
            metavar="NAMES",
            help="Look things up in made texts: passkey, multi_key, variable_tracking, "
            "common_words, or all.",
            default="none",
        ),
    ] = None,
    retrieval_tokens: Annotated[
        int | None,
        option(
            "--retrieval-tokens",
            panel=DATA,
            metavar="N",
            help="Tokens of a text to look things up in, with question and answer.",
            default="2048, at most the model's positions",
            min=1,
        ),
    ] = None,
    num_examples: Annotated[
        int | None,
        option(
            "--num-examples",
            panel=DATA,
            metavar="N",
            help="Texts of each task of --retrieval.",
            default="50",
            min=1,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        option("--seed", panel=DATA, help="Chooses the texts of --retrieval.", default="0"),
    ] = None,
    tasks: Annotated[
        str | None,
        option(
            "--tasks",
            panel=DATA,
            metavar="NAMES",
            help='Tasks of lm_eval, with commas between; needs pip install "kvq[eval]".',
            default="none",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        option(
            "--num-fewshot",
            panel=DATA,
            metavar="N",
            help="Examples before each question of a task.",
            default="the task's",
            min=0,
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        option(
            "--tasks-path",
            panel=DATA,
            metavar="DIR",
            help="Folder with tasks of your own.",
            default="none",
        ),
    ] = None,
    split: Annotated[
        str | None,
        option("--split", panel=DATA, help="Split of a Hub data set.", default="test"),
    ] = None,
    text_column: TextColumn = None,
    limit: Annotated[
        int | None,
        option(
            "--limit",
            panel=DATA,
            metavar="N",
            help="Only N windows of each text, evenly spread, or N samples of each task.",
            default="all",
            min=1,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        option(
            "--seq-len",
            panel=DATA,
            help="Tokens a window; at most the model's positions.",
            default="2048",
            min=2,
        ),
    ] = None,
    batch_size: BatchSize = 1,
    path: Annotated[
        Literal["prefill", "decode", "both"],
        option(
            "--path",
            panel=DATA,
            help="prefill: one forward a window; decode: token by token, as generation reads.",
        ),
    ] = "prefill",
    max_ppl_increase: Annotated[
        float | None,
        option(
            "--max-ppl-increase",
            panel=OUTPUT,
            metavar="X",
            help="Leave with exit code 3 if perplexity rises by more.",
            default="no bar",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        option(
            "--max-kl",
            panel=OUTPUT,
            metavar="X",
            help="Leave with exit code 3 if the mean KL, in nats a token, is larger.",
            default="no bar",
        ),
    ] = None,
    destination: Annotated[
        Path | None,
        option(
            "-o",
            "--save",
            panel=OUTPUT,
            metavar="FILE",
            help="JSON file for the raw results, window by window.",
            default="in kvq's cache folder",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Measure what a quantized cache costs.

    Perplexity with its standard error, KL divergence and top-1 agreement,
    against the unquantized model on the same tokens. Other methods can be held
    against it, charged for every byte that they store; docs/evaluation.md
    lists them. Retrieval is measured on texts that are made for it
    (docs/retrieval.md). On the prefill path every
    key and value but sinks and recent tokens is decoded from its code before a
    query sees it. On the decode path each token is one forward through the
    packed cache, and a query's own page of 256 tokens is exact. Effective bits
    are counted from bytes at the window's length, without the page that is not
    complete.

    [bold]Examples[/bold]
      kvq eval --ppl wikitext2
      kvq eval Qwen/Qwen3-0.6B --sidecar ./q3 --sidecar ./q4 --ppl c4
      kvq eval --ppl builtin --path decode --limit 4
      kvq eval --baseline kivi2,hadamard4,turboquant3 --ppl builtin
      kvq eval --ppl ./my-text.txt --max-ppl-increase 0.1
      kvq eval --retrieval all --retrieval-tokens 4096 --path both
      kvq eval --tasks gsm8k,arc_easy --limit 100
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    load_in = chosen_load_in(context, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    from importlib.metadata import version

    from kvq_calibration.data import load_text
    from kvq_cli.baselines import make_baselines, used_baselines
    from kvq_cli.measurement import (
        check_gated,
        check_gates,
        check_limits,
        cut_texts,
        measure,
        raise_missed,
        tables,
        window_length,
    )
    from kvq_cli.retrieval import asked_retrieval, measure_retrieval, retrieval_table
    from kvq_cli.session import check_file, current_sidecar, new_results_file, recall, write_json
    from kvq_cli.tasks import find_tasks, measure_tasks, tasks_table
    from kvq_evaluation.baselines.building import parse_baselines
    from kvq_evaluation.sidecars import row_names
    from kvq_formats.fingerprint import check
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.models import load_model, load_tokenizer, resolve_model
    from kvq_runtime.sidecars import find_sidecar

    check_limits(max_ppl_increase=max_ppl_increase, max_kl=max_kl)
    saved = check_file(new_results_file() if destination is None else destination, schema=SCHEMA)
    asked = parse_baselines(baseline)
    loaded_tasks = None
    if tasks is not None:
        loaded_tasks = find_tasks(output, tasks, num_fewshot=num_fewshot, tasks_path=tasks_path)
    elif num_fewshot is not None or tasks_path is not None:
        raise ConfigError("--num-fewshot and --tasks-path are about --tasks.", hint="--tasks NAME")
    given = list(sidecar or ())
    name = chosen_model(model, model_alias)
    # Baselines need a model and no sidecar, and take the current one along where there is one.
    if not given and not (asked and name is not None and recall() is None):
        given = [str(current_sidecar(output))]
    paths = [find_sidecar(name) for name in given]
    sidecars = dict(zip(row_names(given), map(Sidecar.load, paths), strict=True))
    if name is None:
        first = next(iter(sidecars.values())).base_model
        name, revision = first.id, revision or first.revision
    resolved = resolve_model(name, revision=revision, trust_remote_code=trust_remote_code)
    for line in resolved.notes:
        output.note(line)
    for made in sidecars.values():
        for line in check(made.base_model, resolved.record):
            output.warn(line)
    looked_up = asked_retrieval(
        retrieval,
        tokens=retrieval_tokens,
        num_examples=num_examples,
        seed=seed,
        positions=resolved.max_positions,
    )
    texts_alone = loaded_tasks is None and looked_up is None
    if ppl is None:
        ppl = "wikitext2" if texts_alone else ""
    names = [part.strip() for part in ppl.split(",") if part.strip()]
    if not names and texts_alone:
        raise ConfigError("--ppl names no text.", hint="--ppl wikitext2")
    check_gated(sidecars, names, max_ppl_increase=max_ppl_increase, max_kl=max_kl)
    measured_too = bool(names) or looked_up is not None
    asked = used_baselines(output, asked, measured=measured_too, tasks=loaded_tasks is not None)
    sources = [
        load_text(text, purpose="eval", split=split, text_column=text_column) for text in names
    ]
    length = window_length(resolved.max_positions, seq_len, output)
    tokenizer = load_tokenizer(resolved)
    texts = cut_texts(output, tokenizer, sources, seq_len=length, limit=limit)
    examples = [] if looked_up is None else looked_up.examples(tokenizer, resolved.max_positions)
    loaded = load_model(
        resolved,
        dtype=dtype.value,
        device_map=device_map,
        attn_implementation=attn_implementation,
        load_in=load_in,
    )
    baselines = make_baselines(output, asked, loaded.model, tokenizer, sidecars, seq_len=length)
    chosen_paths: tuple[MeasuredPath, ...] = ("prefill", "decode") if path == "both" else (path,)
    measured = measure(
        output,
        loaded.model,
        sidecars,
        texts,
        baselines=baselines,
        path=chosen_paths,
        batch_size=batch_size,
    )
    retrieval_rows = []
    if examples:
        retrieval_rows = measure_retrieval(
            output,
            loaded.model,
            sidecars,
            examples,
            baselines=baselines,
            path=chosen_paths,
        )
    task_rows = []
    if loaded_tasks is not None:
        task_rows = measure_tasks(
            output,
            loaded.model,
            tokenizer,
            sidecars,
            loaded_tasks,
            limit=limit,
            batch_size=batch_size,
        )
    gates = check_gates(measured, sidecars, max_ppl_increase=max_ppl_increase, max_kl=max_kl)
    payload = {
        "schema": SCHEMA,
        "kvq_version": version("kvq"),
        "path": path,
        "base_model": loaded.record.model_dump(mode="json"),
        "sidecars": {
            row: {"path": str(path), "config": made.config.model_dump(mode="json")}
            for path, (row, made) in zip(paths, sidecars.items(), strict=True)
        },
        "baselines": {one.name: one.method.summary for one in asked},
        "retrieval": None if looked_up is None else looked_up.to_json(retrieval_rows),
        "tasks": [row.to_json() for row in task_rows],
        "gates": [gate.to_json() for gate in gates],
    }
    write_json(saved, {**payload, "texts": [text.to_json(per_window=True) for text in measured]})
    payload["texts"] = [text.to_json(per_window=False) for text in measured]
    payload["results"] = str(saved)
    drawn = tables(measured)
    drawn += [retrieval_table(retrieval_rows)] if retrieval_rows else []
    drawn += [tasks_table(task_rows)] if task_rows else []
    output.result(payload, *drawn)
    output.note(f"raw results are in {saved}")
    raise_missed(gates)
    if given:
        output.next(shlex.join(["kvq", "generate", "--sidecar", given[0]]))
    else:
        output.next(shlex.join(["kvq", "calibrate", name, "--bits", "3"]))
