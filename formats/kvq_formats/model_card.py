"""The README of a sidecar folder, which the Hub shows as its model card."""

from __future__ import annotations

import json
import re

from kvq_formats.config import KVQConfig, widths_in_words
from kvq_formats.records import EMBEDDED_MODEL_ID
from kvq_formats.sidecar_header import CONFIG_FILE, TENSORS_FILE, SidecarHeader

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

TEMPLATE = """\
---
{front_matter}
---

# {name}, key/value cache at {bits}

A *sidecar* for `kvq`. It holds no weights: with it, the key/value cache of {model} takes
{effective:.2f} bits a number instead of 16.

| | |
|---|---|
| base model | {model}{revision} |
| shape | {shape} |
| keys | {key_bits}, per channel, before RoPE |
| values | {value_bits}, scaled per {value_grain} |
| outliers | {outliers} |
| kept unquantized | {kept} |
| calibrated on | {calibration} |
| effective bits at {tokens:,} tokens | {effective:.3f} a number, counted from bytes; {total:.3f} \
with the page that is not complete |
| written by | kvq {kvq_version}, format {format_version} |

`{tensors_file}` is complete by itself; `{config_file}` repeats its metadata for people.

## Use

On the command line, from the folder that holds this file:

```
kvq inspect .
kvq eval {model_argument} --sidecar . --ppl wikitext2
kvq generate {model_argument} --sidecar . -p "The quick brown fox"
```

In Python:

```python
import kvq
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({model_source})
tokenizer = AutoTokenizer.from_pretrained({model_source})
inputs = tokenizer("The quick brown fox", return_tensors="pt")
with kvq.attach(model, "."):
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0]))
```

What it costs in accuracy depends on the text: measure it on yours with `kvq eval`.
"""


def model_card(header: SidecarHeader) -> str:
    """Markdown with the Hub's front matter; says what is known and invents no results."""
    config, model = header.config, header.base_model
    embedded = model.id == EMBEDDED_MODEL_ID
    on_hub = not embedded and HUB_ID.fullmatch(model.id) is not None
    # The card is what people share: of a local folder it gives the name and not the path.
    name = model.id if on_hub or embedded else model.name
    if embedded:
        described, argument = f"the model `{name}` that is part of kvq", name
        source = "kvq.embedded_model_path()"
    elif on_hub:
        described, argument = name, name
        revision = f", revision={json.dumps(model.revision)}" if model.revision else ""
        source = json.dumps(name) + revision
    else:
        described, argument = f"the local model `{name}`", "MODEL"
        source = json.dumps(f"path/to/{name}")
    text = header.calibration
    key_bits, value_bits = config.bits_in_words()
    fraction = config.outlier_fraction
    return TEMPLATE.format(
        front_matter=_front_matter(model.id if on_hub else None),
        name=name,
        bits=_bits(config),
        model=described,
        revision=f" at commit `{model.revision}`" if model.revision else "",
        shape=model.fingerprint.summary,
        key_bits=key_bits,
        value_bits=value_bits,
        value_grain="token" if config.value_grain == "token" else "token and head",
        outliers=f"{100 * fraction:g} % kept apart in 16 bits" if fraction else "none kept apart",
        kept=f"{config.sink_tokens} sink tokens, {config.recent_tokens} recent tokens",
        calibration=(
            f"{text.dataset}, {text.num_samples} windows of {text.seq_len} tokens, seed {text.seed}"
        ),
        effective=header.effective_bits["without_unfinished"],
        total=header.effective_bits["total"],
        tokens=header.effective_bits["tokens"],
        kvq_version=header.kvq_version,
        format_version=header.format_version,
        tensors_file=TENSORS_FILE,
        config_file=CONFIG_FILE,
        model_argument=argument,
        model_source=source,
    )


def _bits(config: KVQConfig) -> str:
    """Widths of keys and values together."""
    if config.layer_bits:
        return widths_in_words([bits for layer in config.layer_bits.values() for bits in layer])
    return "-".join(map(str, sorted({config.key_bits, config.value_bits}))) + " bits"


def _front_matter(base_model: str | None) -> str:
    lines = ["library_name: kvq"]
    if base_model is not None:
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    tags = ("kvq", "kv-cache", "quantization")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])
