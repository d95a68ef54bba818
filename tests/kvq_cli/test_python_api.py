"""``kvq.py`` is one page of names; each is what the command of the same name uses."""

from __future__ import annotations

import importlib
import shlex
import typing
from pathlib import Path

import pytest
import torch

import kvq
from command_line import Kvq
from kvq_formats.sidecar import Sidecar
from kvq_runtime.embedded import EMBEDDED_MODEL_ID

if typing.TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.mark.parametrize("name", kvq.__all__)
def test_every_name_can_be_loaded(name: str) -> None:
    assert getattr(kvq, name) is not None
    assert name in dir(kvq)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="generate"):
        getattr(kvq, "generate")  # noqa: B009 - the name does not exist on purpose


def test_every_name_has_a_home_that_exists() -> None:
    for module, attribute in kvq._HOMES.values():
        assert hasattr(importlib.import_module(module), attribute)


def test_calibrate_attach_and_evaluate(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    made = kvq.calibrate(tiny_model_dir, bits=2, dataset=str(text_file), num_samples=2, seq_len=128)
    made.save(tmp_path / "q")
    assert isinstance(kvq.load_sidecar(tmp_path / "q"), Sidecar)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokens = torch.arange(128).reshape(2, 64) % 300 + 2
    with torch.no_grad():
        before = model(tokens).logits
        with kvq.attach(model, tmp_path / "q", rule="evaluation"):
            attached = model(tokens).logits
        after = model(tokens).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, attached)
    plan = kvq.plan_memory(model, made, context=1024)
    with kvq.attach(model, made):
        cache = kvq.PackedCache(model, made, capacity=1024)
        generated = model.generate(tokens[:1], past_key_values=cache, max_new_tokens=2)
    assert generated.shape == (1, 66)
    assert cache.allocated_bytes == plan.cache
    rows = kvq.evaluate(model, [tmp_path / "q", made], tokens=tokens)
    assert [row.name for row in rows] == ["unquantized", "q", "sidecar 2"]
    assert rows[1].kl == rows[2].kl > 0


@pytest.mark.parametrize("model", [(), (EMBEDDED_MODEL_ID,)])
def test_the_embedded_model_is_known_to_python_too(
    model: tuple[str, ...], kvq_command: Kvq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one; what its sidecar's card tells people to type runs as it stands."""
    made = kvq.calibrate(*model, bits=3, num_samples=1, seq_len=64)
    assert made.base_model.id == EMBEDDED_MODEL_ID
    assert made.base_model.revision is None
    monkeypatch.chdir(made.save(tmp_path / "q"))
    card = Path("README.md").read_text()
    names: dict[str, typing.Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    shell = card.split("```\n")[1].splitlines()
    command = next(line for line in shell if line.startswith("kvq generate"))
    assert kvq_command(*shlex.split(command)[1:], "--max-new-tokens", 2).code == 0
