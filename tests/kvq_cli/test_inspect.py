from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Kvq
from kvq_cli.output import Output
from kvq_cli.session import remember
from tiny_sidecars import make_sidecar


def test_inspect_shows_what_it_is_and_what_it_costs(kvq: Kvq, sidecar: Path) -> None:
    ran = kvq("inspect", sidecar)
    assert ran.code == 0
    for what in (
        "base model", "llama, 2 layers, 2 KV heads, head_dim 16", "2 x 128 tokens, seed 0",
        "keys 3 bits, values 3 bits, 1 % outliers", "effective bits", "unfinished",
        "static tables", "key error", "value outliers",
    ):  # fmt: skip
        assert what in ran.stdout
    assert ran.stderr == f"Next: kvq eval --sidecar {sidecar} --ppl wikitext2\n"


def test_json(kvq: Kvq, sidecar: Path) -> None:
    found = kvq("inspect", sidecar / "kvq.safetensors", "--json").json
    assert found["schema"] == "kvq.inspect/1"
    assert found["base_model"]["fingerprint"]["num_hidden_layers"] == 2
    bits = found["effective_bits"]
    parts = ("codes", "scales", "outliers", "positions", "sinks", "recent", "unfinished")
    assert sum(bits[part] for part in parts) == pytest.approx(bits["total"], abs=1e-5)
    assert bits["table_bytes"] > 0
    assert [layer["layer_idx"] for layer in found["layers"]] == [0, 1]
    assert all(0 < layer["key_error"] < 1 for layer in found["layers"])
    assert [(layer["key_bits"], layer["value_bits"]) for layer in found["layers"]] == [(3, 3)] * 2
    assert "layer_bits" not in found["config"]


def test_layers_of_different_widths(kvq: Kvq, tmp_path: Path) -> None:
    path = make_sidecar(layer_bits={0: (2, 4), 1: (3, 2)}).save(tmp_path / "mixed")
    found = kvq("inspect", path, "--json").json
    assert [(layer["key_bits"], layer["value_bits"]) for layer in found["layers"]] == [
        (2, 4),
        (3, 2),
    ]
    assert found["config"]["layer_bits"] == {"0": [2, 4], "1": [3, 2]}
    # Of a key and a value: (2 + 4) / 2 and (3 + 2) / 2 bits, in 127 of 128 pages.
    assert found["effective_bits"]["codes"] == pytest.approx(2.75 * 127 / 128, abs=1e-6)
    shown = kvq("inspect", path).stdout
    assert "keys 2-3 bits (2.5 on average), values 2-4 bits (3 on average)" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert [row[1] for row in rows if row[:1] in (["0"], ["1"])] == ["2/4", "3/2"]


def test_without_a_name_the_current_sidecar_is_shown(kvq: Kvq, sidecar: Path) -> None:
    assert kvq("inspect").code == 1
    remember(sidecar, Output())
    ran = kvq("inspect")
    assert ran.code == 0
    assert f"Note: using the current sidecar, {sidecar}" in ran.stderr


def test_the_environment_may_name_the_sidecar(
    kvq: Kvq, sidecar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQ_SIDECAR", str(sidecar))
    ran = kvq("inspect")
    assert ran.code == 0
    assert ran.stderr == f"Next: kvq eval --sidecar {sidecar} --ppl wikitext2\n"
    monkeypatch.setenv("KVQ_SIDECAR", f"{sidecar} nowhere")
    ran = kvq("inspect")
    assert ran.code == 0
    assert "KVQ_SIDECAR names 2 sidecars; this is the first" in ran.stderr
    monkeypatch.setenv("KVQ_SIDECAR", "nowhere")
    assert kvq("inspect").code == 1
    assert kvq("inspect", sidecar).code == 0


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_sidecar_there(
    kvq: Kvq, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = kvq("inspect", name, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "SidecarError"


def test_an_altered_sidecar_is_refused(kvq: Kvq, sidecar: Path, tmp_path: Path) -> None:
    content = bytearray((sidecar / "kvq.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "kvq.safetensors").write_bytes(content)
    ran = kvq("inspect", tmp_path, "--json")
    assert ran.code == 1
    assert "damaged or was altered" in ran.json["error"]["message"]
    (tmp_path / "kvq.safetensors").write_bytes(content[:-5])
    assert kvq("inspect", tmp_path, "--json").code == 1


def test_inspect_needs_no_transformers(sidecar: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from kvq_cli.app import main\n"
        f"main(['inspect', {str(sidecar)!r}])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "effective bits" in ran.stdout
