"""``kvq generate``: continue a prompt on a packed cache."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvq_cli.options import (
    PROMPT,
    QUANTIZATION,
    SAMPLING,
    AsJson,
    AttnImplementation,
    DeviceMap,
    Dtype,
    DtypeOption,
    LoadIn4bit,
    LoadIn8bit,
    ModelAlias,
    NoProgress,
    Quiet,
    Revision,
    TrustRemoteCode,
    Verbose,
    chosen_load_in,
    chosen_model,
    model_argument,
    option,
    overruled,
)
from kvq_cli.output import Output
from kvq_formats.errors import ConfigError


def generate(
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
            help="Sidecar: folder, file or Hub id.",
            default="the current sidecar",
        ),
    ] = None,
    exact_prefill: Annotated[
        bool,
        option(
            "--exact-prefill",
            panel=QUANTIZATION,
            help="Read the prompt in one piece, its tokens unquantized to each other; marked so.",
        ),
    ] = False,
    impl: Annotated[
        Literal["auto", "reference", "triton"],
        option(
            "--impl", panel=QUANTIZATION, help="Attention over packed pages; auto: by the device."
        ),
    ] = "auto",
    cuda_graph: Annotated[
        bool | None,
        option(
            "--cuda-graph/--no-cuda-graph",
            panel=QUANTIZATION,
            help=(
                "Decode from a CUDA graph; --cuda-graph fails where that is impossible, "
                "--no-cuda-graph never tries."
            ),
            default="on a GPU, where the model allows it",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        option(
            "-p",
            "--prompt",
            panel=PROMPT,
            metavar="TEXT",
            help="Text to continue; - reads stdin.",
            default="piped stdin, else a bundled text",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        option("--prompt-file", panel=PROMPT, metavar="FILE", help="UTF-8 file to continue."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        option(
            "--apply-chat-template",
            panel=PROMPT,
            help="Make the prompt a user's turn, in the model's own chat format.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, option("--max-new-tokens", panel=PROMPT, metavar="N", help="Stop after N.", min=1)
    ] = 256,
    size: Annotated[
        str | None,
        option(
            "--context",
            panel=PROMPT,
            metavar="SIZE",
            help="Tokens that the cache has room for, prompt included: 4096, 32k, 1M, ...",
            default="prompt + --max-new-tokens",
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        option(
            "--prefill-chunk",
            panel=PROMPT,
            metavar="N",
            help="Tokens of the prompt a forward pass.",
            default="512",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float,
        option(
            "--temperature", panel=SAMPLING, help="Of the softmax; 0 takes the likeliest token."
        ),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        option(
            "--top-p",
            panel=SAMPLING,
            help="Likeliest tokens that have this probability together.",
            default="all",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        option("--top-k", panel=SAMPLING, help="So many likeliest tokens.", default="all"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        option(
            "--repetition-penalty",
            panel=SAMPLING,
            help="Divides the scores of tokens that occurred already.",
            default="none",
        ),
    ] = None,
    seed: Annotated[int, option("--seed", panel=SAMPLING, help="Of the random numbers.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Continue a prompt on a quantized cache.

    Text appears on stdout as it is generated. The cache holds packed codes and
    nothing else: keys and values are decoded in blocks as attention reads them.
    A query reads complete pages of 256 tokens from their codes, and its own
    page, the sinks and recent tokens exactly, however the prompt is fed.

    [bold]Examples[/bold]
      kvq generate -p "The history of the bicycle begins"
      kvq generate --context 32k --prompt-file ./long.txt --max-new-tokens 500
      kvq generate Qwen/Qwen3-0.6B --sidecar ./q3 --temperature 0.7 --top-p 0.95
      git log -5 | kvq generate -p - --json
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    load_in = chosen_load_in(context, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    from functools import partial

    from kvq_cli.generation import Run
    from kvq_cli.memory_plan import (
        check_plan,
        check_within_window,
        make_room,
        say_plan,
        warn_beyond_positions,
    )
    from kvq_cli.prompts import read_prompt
    from kvq_cli.session import one_sidecar
    from kvq_cli.sizes import parse_tokens
    from kvq_runtime.sampling import Sampling

    if overruled(context, "prompt", by="prompt_file"):
        prompt = None
    if overruled(context, "prompt_file", by="prompt"):
        prompt_file = None
    if overruled(context, "prefill_chunk", by="exact_prefill"):
        prefill_chunk = None
    if overruled(context, "exact_prefill", by="prefill_chunk"):
        exact_prefill = False
    if cuda_graph and overruled(context, "impl", by="cuda_graph"):
        impl = "auto"
    if impl == "reference" and overruled(context, "cuda_graph", by="impl"):
        cuda_graph = None
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    asked_context = None if size is None else parse_tokens(size, flag="--context")
    if exact_prefill and prefill_chunk is not None:
        raise ConfigError(
            "--exact-prefill reads the prompt in one piece, and --prefill-chunk in several.",
            hint="leave one of them out",
        )
    if cuda_graph and impl == "reference":
        raise ConfigError(
            "--cuda-graph captures Triton kernels, and --impl reference runs none.",
            hint="leave one of them out",
        )
    # Before the libraries are imported, which takes seconds.
    given = read_prompt(output, prompt, prompt_file)
    named = one_sidecar(output, sidecar)

    from kvq_formats.fingerprint import check
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.capturable import check_cuda
    from kvq_runtime.generate import PREFILL_CHUNK, encode_prompt
    from kvq_runtime.implementation import choose_implementation
    from kvq_runtime.memory import plan_memory
    from kvq_runtime.models import (
        first_device,
        load_model,
        load_tokenizer,
        resolve_model,
        target_device,
    )
    from kvq_runtime.sidecars import find_sidecar

    path = find_sidecar(named)
    made = Sidecar.load(path)
    name = chosen_model(model, model_alias)
    if name is None and revision is None:
        revision = made.base_model.revision
    resolved = resolve_model(
        name or made.base_model.id, revision=revision, trust_remote_code=trust_remote_code
    )
    for line in resolved.notes:
        output.note(line)
    for line in check(made.base_model, resolved.record):
        output.warn(line)
    place = target_device(device_map)
    requested = None if impl == "auto" else impl
    implementation = choose_implementation(first_device(place), requested)
    if cuda_graph:
        check_cuda(first_device(place))
    input_ids = encode_prompt(
        load_tokenizer(resolved), given.text, apply_chat_template=apply_chat_template
    )
    prompt_tokens = input_ids.shape[-1]
    room = make_room(output, prompt_tokens, context=asked_context, new_tokens=max_new_tokens)
    check_within_window(room.capacity, resolved.context_limit, name=resolved.record.id)
    warn_beyond_positions(output, room.capacity, resolved.max_positions)
    chunk = prompt_tokens if exact_prefill else prefill_chunk or PREFILL_CHUNK
    replan = partial(plan_memory, resolved, context=room.capacity, impl=requested, load_in=load_in)
    plan = replan(made, prefill_chunk=chunk, dtype=dtype.value, device=place)
    say_plan(output, plan, in_full=asked_context is not None or verbose)
    check_plan(
        plan,
        made,
        replan,
        dtype=dtype.value,
        is_exact=exact_prefill,
        needed=prompt_tokens + 1,
    )
    output.note(f"attention: {implementation.name} ({implementation.reason})")
    loaded = load_model(
        resolved,
        dtype=dtype.value,
        device_map=device_map,
        attn_implementation=attn_implementation,
        load_in=load_in,
    )
    run = Run(
        loaded=loaded,
        sidecar=made,
        sidecar_path=path,
        prompt=given,
        room=room,
        plan=plan,
        implementation=implementation,
        requested=requested,
        prefill_chunk=None if exact_prefill else chunk,
        sampling=sampling,
        cuda_graph=cuda_graph,
    )
    run.generate(output, input_ids)
    following = ["kvq", "eval", *([name] if name else []), "--sidecar", named, "--path", "decode"]
    output.next(shlex.join(following))
