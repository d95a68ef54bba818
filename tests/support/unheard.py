"""A family that nobody has heard of: a model folder with code of its own.

Made from the text of a modeling file of transformers, under names that neither transformers nor kvq
knows, with a change here and there.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import configuration_llama, modeling_llama

NAME = "Unheard"


def write_unheard(parent: Path, changes: Mapping[str, str], **options: Any) -> Path:
    """A folder with config.json, code and random weights, without a tokenizer.

    ``changes`` replace text of the modeling file; each must be there.
    """
    # transformers remembers code by the name of its folder.
    digest = hashlib.sha256(json.dumps([dict(changes), options]).encode()).hexdigest()[:12]
    folder = parent / f"unheard_{digest}"
    folder.mkdir(parents=True)
    code = _as_remote_code(inspect.getsource(modeling_llama), "llama")
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    (folder / "modeling_unheard.py").write_text(code)
    (folder / "configuration_unheard.py").write_text(
        _as_remote_code(inspect.getsource(configuration_llama), "llama")
    )
    config = LlamaConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": 1,
            **options,
        }
    ).to_dict()
    config |= {
        "model_type": "unheard",
        "architectures": [f"{NAME}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_unheard.{NAME}Config",
            "AutoModelForCausalLM": f"modeling_unheard.{NAME}ForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load_unheard(folder, from_config=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_unheard(folder: Path, *, from_config: bool = False) -> Any:
    """The model of a folder, as ``trust_remote_code`` loads it."""
    if from_config:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def _as_remote_code(code: str, family: str) -> str:
    code = code.replace(
        f"from .configuration_{family} import", "from .configuration_unheard import"
    )
    # Relative imports within transformers, from outside of it.
    code = re.sub(r"from \.\.\.(?=\w)", "from transformers.", code)
    code = re.sub(r"from \.\.\. import", "from transformers import", code)
    return code.replace("Llama", NAME).replace('model_type = "llama"', 'model_type = "unheard"')
