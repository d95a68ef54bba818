from __future__ import annotations

import pytest

from kvq_formats.errors import ConfigError, ModelError
from kvq_runtime import embedded
from kvq_runtime.embedded import EMBEDDED_MODEL_ID, embedded_model_path
from kvq_runtime.resolve import resolve_model


def test_its_files_are_where_they_are_said_to_be() -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in embedded_model_path().iterdir()
    }


@pytest.mark.parametrize("name", [None, EMBEDDED_MODEL_ID])
def test_its_id_and_no_name_mean_the_same(name: str | None) -> None:
    resolved = resolve_model(name)
    assert resolved.location == str(embedded_model_path())
    assert resolved.is_local
    assert resolved.record.id == EMBEDDED_MODEL_ID
    assert resolved.record.fingerprint.model_type == "llama"


def test_it_has_no_revision() -> None:
    with pytest.raises(ConfigError, match="no revision"):
        resolve_model(revision="main")


@pytest.mark.parametrize("holder", ["kvq_formats", "no_such_package"])
def test_an_installation_without_it_says_so(holder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_HOLDER", holder)
    with pytest.raises(ModelError, match="missing from this installation"):
        embedded.embedded_model_path()
