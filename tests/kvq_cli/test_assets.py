from __future__ import annotations

from pathlib import Path

import pytest

from kvq_cli import assets
from kvq_formats.errors import ModelError


def test_the_embedded_models_id_and_no_name_mean_the_same(embedded: Path) -> None:
    for name in (None, assets.EMBEDDED_MODEL_ID):
        resolved = assets.resolve(name)
        assert resolved.location == str(embedded)
        assert resolved.record.id == assets.EMBEDDED_MODEL_ID


def test_an_installation_without_the_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match="missing from this installation"):
        assets.embedded_model_path()
