from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from loop_nest import loop_nest, parse_amdgcn, parse_sass

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def kernel_code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return importlib.import_module("kernel_code")


def sass(*lines: str, kernel: str = "toy") -> str:
    """Disassembly as nvdisasm prints it: instructions, labels and places in the source."""
    text = [f'\t.section\t.text.{kernel},"ax",@progbits', f"{kernel}:", f".text.{kernel}:"]
    address = 0
    for line in lines:
        if line.endswith(":") or line.startswith("\t//##"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join([*text, "\t.section\t.debug_line", ""])


def sizes(text: str, *, amd: bool = False) -> dict[str, tuple[int, int]]:
    """Own and all instructions of each loop, and under "once" those outside."""
    nest = loop_nest((parse_amdgcn if amd else parse_sass)(text, "toy"))
    loops = {loop.name: (len(loop.own), loop.total) for loop in nest.loops}
    return {"once": (len(nest.once), len(nest.once)), **loops}


PADDING = ("EXIT", ".L_x_90:", "BRA `(.L_x_90)", "NOP", "NOP", ".L_x_91:")

NESTED = sass(
    "LDC R1, c[0x0][0x28]",
    ".L_x_0:",
    "IADD3 R2, R2, 0x1, RZ",
    ".L_x_1:",
    "LDG.E R4, desc[UR6][R2.64]",
    "FFMA R5, R4, R4, R5",
    "@P0 BRA `(.L_x_1)",
    "@!P1 BRA `(.L_x_0)",
    "HMMA.16816.F32 R8, R4, R5, R8",
    "@P2 BRA `(.L_x_0)",
    "STG.E desc[UR6][R2.64], R5",
    *PADDING,
)


def test_nested_loops_and_two_branches_to_one_header() -> None:
    assert sizes(NESTED) == {"once": (3, 3), "0": (4, 7), "0.0": (3, 3)}


def test_loops_that_follow_each_other_and_one_level_deeper() -> None:
    text = sass(
        ".L_x_0:",
        ".L_x_1:",
        "FADD R1, R1, R2",
        "FADD R1, R1, R3",
        "BRA.U !UP0, `(.L_x_1)",
        "MOV R3, R4",
        ".L_x_2:",
        "FADD R3, R3, R4",
        ".L_x_3:",
        "FMUL R3, R3, R4",
        "@!P0 BRA `(.L_x_3)",
        "@P1 BRA `(.L_x_2)",
        "MUFU.EX2 R3, R3",
        ".L_x_4:",
        "FADD R5, R3, R5",
        "@P1 BRA `(.L_x_4)",
        *PADDING,
    )
    assert sizes(text) == {
        "once": (3, 3), "0": (3, 3), "1": (2, 4), "1.0": (2, 2), "2": (2, 2),
    }  # fmt: skip


def test_both_branches_of_an_if_in_a_loop_count() -> None:
    text = sass(
        ".L_x_0:",
        "BSSY B0, `(.L_x_2)",
        "@P0 BRA `(.L_x_1)",
        "FADD R1, R1, R2",
        "BRA `(.L_x_3)",
        ".L_x_1:",
        "FMUL R1, R1, R2",
        ".L_x_3:",
        "BSYNC B0",
        ".L_x_2:",
        "@!P1 EXIT",
        "BRA `(.L_x_0)",
        *PADDING,
    )
    # the only way out is the EXIT inside
    assert sizes(text) == {"once": (0, 0), "0": (8, 8)}


def test_code_behind_the_loop_in_the_text_that_belongs_to_it() -> None:
    text = sass(
        ".L_x_0:",
        "@P0 BRA `(.L_x_5)",
        ".L_x_1:",
        "FADD R1, R1, R2",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_5:",
        "FMUL R1, R1, R2",
        "BRA `(.L_x_1)",
        *PADDING,
    )
    assert sizes(text) == {"once": (1, 1), "0": (5, 5)}


def test_code_for_threads_that_went_apart_does_not_count() -> None:
    text = sass(
        ".L_x_0:",
        "BRA.DIV UR4, `(.L_x_5)",
        ".L_x_1:",
        "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_5:",
        "WARPSYNC.COLLECTIVE R1, `(.L_x_6)",
        ".L_x_6:",
        "BRA `(.L_x_1)",
        *PADDING,
    )
    assert sizes(text) == {"once": (1, 1), "0": (3, 3)}


def test_a_loop_entered_in_its_middle_is_a_loop() -> None:
    text = sass(
        "@P0 BRA `(.L_x_1)",
        ".L_x_0:",
        "FADD R1, R1, R2",
        ".L_x_1:",
        "FMUL R1, R1, R2",
        "@P1 BRA `(.L_x_0)",
        *PADDING,
    )
    assert sizes(text) == {"once": (2, 2), "0": (3, 3)}


def test_called_functions_are_reported_and_calls_that_never_return_are_branches() -> None:
    nest = loop_nest(
        parse_sass(
            sass(
                ".L_x_0:",
                "MOV R8, 0x30",
                "CALL.REL.NOINC `($__internal_0_$__division)",
                "FADD R1, R1, R2",
                "@!P0 CALL.REL.NOINC `(.L_x_1)",
                "BRA `(.L_x_0)",
                ".L_x_1:",
                "STG.E desc[UR6][R2.64], R1",
                "EXIT",
                "$__internal_0_$__division:",
                "@P0 BRA `(.L_x_2)",
                "FMUL R1, R1, R2",
                ".L_x_2:",
                "RET.REL.NODEC R8 `(toy)",
                *PADDING,
            ),
            "toy",
        )
    )
    assert len(nest.once) == 2
    assert [(loop.name, len(loop.own)) for loop in nest.loops] == [("0", 5)]
    assert [(call.loop, call.size) for call in nest.calls] == [("0", 3)]
    assert "not counted: CALL.REL.NOINC" in str(nest)


def test_source_of_a_loop_is_that_of_its_branch_back() -> None:
    text = sass(
        '\t//## File "/a/kernel.py", line 7',
        ".L_x_0:",
        '\t//## File "/a/helper.py", line 3',
        "FADD R1, R1, R2",
        '\t//## File "/a/kernel.py", line 7',
        "@P0 BRA `(.L_x_0)",
        *PADDING,
    )
    (loop,) = loop_nest(parse_sass(text, "toy")).loops
    assert [instruction.source for instruction in loop.own] == ["helper.py:3", "kernel.py:7"]
    assert loop.source == "kernel.py:7"


@pytest.mark.parametrize("code", ["BRA `(.L_x_7)", "BRX R2 -0x10", "@P0 JMX R2"])
def test_a_branch_whose_target_is_not_known_is_an_error(code: str) -> None:
    with pytest.raises(ValueError, match="A branch"):
        loop_nest(parse_sass(sass(code, *PADDING), "toy"))


def test_a_jump_table() -> None:
    text = sass(
        ".L_x_0:",
        'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)',
        ".L_x_1:",
        "BRA `(.L_x_0)",
        ".L_x_2:",
        *PADDING,
    )
    assert sizes(text) == {"once": (1, 1), "0": (2, 2)}


def test_only_the_kernel_asked_for_is_read() -> None:
    text = sass("FADD R1, R1, R2", *PADDING, kernel="other") + NESTED
    assert sizes(text) == sizes(NESTED)
    with pytest.raises(ValueError, match="No code of third"):
        parse_sass(text, "third")


AMDGCN = """\
\t.type\ttoy,@function
toy:                                    ; @toy
; %bb.0:
\t.loc\t1 4 24 is_stmt 1                ; toy.py:4:24
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_3
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=1
\tv_fmac_f32_e32 v1, 0.5, v2
\t.loc\t1 6 19                          ; toy.py:6:19
\ts_cbranch_scc0 .LBB0_7
.LBB0_3:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_5 Depth 2
\tv_mov_b32_e32 v1, 0
\ts_cbranch_scc1 .LBB0_2
.LBB0_5:                                ; =>  This Inner Loop Header: Depth=2
\t.loc\t1 9 28                          ; lib.py:2:28 @[ toy.py:9:5 ]
\tbuffer_load_dword v3, v0, s[8:11], 0 offen
\t;;#ASMSTART
\tv_perm_b32 v4, v3, v3, s4
\t;;#ASMEND
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_16x16x16_f16 a[0:3], v[2:3], v[4:5], a[0:3]
\tscratch_load_dword v5, off, off
\ts_cbranch_vccnz .LBB0_5
\ts_branch .LBB0_2
.LBB0_6:
\ts_sethalt 5
\ts_branch .LBB0_6
.LBB0_7:
\ts_cbranch_execz .LBB0_8
\ts_branch .LBB0_6
.LBB0_8:
\tbuffer_store_dword v1, v0, s[4:7], 0 offen
\ts_endpgm
.Lfunc_end0:
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     4
    .args:
      - .address_space:  global
        .offset:         0
        .size:           8
    .private_segment_fixed_size: 72
    .sgpr_count:     21
    .sgpr_spill_count: 1
    .symbol:         toy.kd
    .vgpr_count:     64
    .vgpr_spill_count: 20
"""


def test_amdgcn_with_a_loop_that_starts_before_its_header_and_a_trap() -> None:
    assert sizes(AMDGCN, amd=True) == {"once": (5, 5), "0": (5, 11), "0.0": (6, 6)}
    outer, inner = loop_nest(parse_amdgcn(AMDGCN, "toy")).loops
    assert [outer.source, inner.source] == ["toy.py:6", "lib.py:2"]
    assert [i.pipe for i in inner.own] == [
        "memory", "vector", "other", "tensor", "stack", "other",
    ]  # fmt: skip


def test_resources(kernel_code: ModuleType) -> None:
    assert kernel_code.amdgcn_usage(AMDGCN) == {
        "registers": 64,
        "spilled_registers": 21,
        "stack_bytes": 72,
    }
    with pytest.raises(ValueError, match="vgpr_count"):
        kernel_code.amdgcn_usage("    .sgpr_count:     21\n")
    usage = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function toy:\n"
        "  REG:255 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert kernel_code.sass_usage(usage, "toy") == {
        "registers": 255,
        "spilled_registers": None,
        "stack_bytes": 32,
    }
    with pytest.raises(ValueError, match="other"):
        kernel_code.sass_usage(usage, "other")


def test_instructions_per_element(kernel_code: ModuleType) -> None:
    nest = loop_nest(parse_sass(NESTED, "toy"))
    # 3 once, 4 in each of 4 iterations, 3 in each of 4 * 2.5
    counts = {"elements": 64, "threads": 32}
    trips = {"0": 4, "0.0": 2.5}
    assert kernel_code.instructions_per_element(nest, trips, **counts) == (3 + 16 + 30) * 32 / 64
    by_pipe = kernel_code.instructions_by_pipe(nest, trips, **counts)
    assert by_pipe == {
        "other": (1 + 4 * 2 + 10) / 2,
        "memory": (2 + 10) / 2,
        "fma": 10 / 2,
        "alu": 4 / 2,
        "tensor": 4 / 2,
    }
    assert kernel_code.instructions_per_element(nest, {"0": 0, "0.0": 9}, **counts) == 1.5


def test_loops_without_trips_are_named_with_size_and_instructions(kernel_code: ModuleType) -> None:
    nest = loop_nest(parse_sass(NESTED, "toy"))
    with pytest.raises(ValueError, match=r"(?s)without trips.*0\.0 \(\?\): 3 of 3: LDG\.E R4") as e:
        kernel_code.instructions_per_element(nest, {"0": 4}, elements=1, threads=32)
    assert "IADD3" not in str(e.value)
    with pytest.raises(ValueError, match=r"do not exist: \['1'\]"):
        kernel_code.instructions_per_element(
            nest, {"0": 4, "0.0": 2, "1": 1}, elements=1, threads=32
        )


HEADER = (
    "kernel,target,variant,bits,"
    "max_instructions_per_element,max_stack_bytes,max_shared_bytes\n"
)  # fmt: skip


def write(path: Path, *rows: str) -> Path:
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def test_budgets(kernel_code: ModuleType, tmp_path: Path) -> None:
    Target = kernel_code.Target
    rows = ("decode,cuda:90,gqa,3,5.5,0,40000", "decode,cuda:80,gqa,3,,128,")
    first, second = kernel_code.read_budgets(write(tmp_path / "b.csv", *rows))
    assert (first.target, first.settings) == (Target.CUDA_90, {"bits": "3"})
    assert (second.max_instructions_per_element, second.max_stack_bytes) == (None, 128)

    def measured(target: object, *numbers: float) -> object:
        return kernel_code.Measured(target, *numbers)

    assert kernel_code.check(measured(Target.CUDA_90, 5.5, 0, 40000), first) == []
    assert kernel_code.check(measured(Target.CUDA_90, 5.625, 8, 40001), first) == [
        "decode cuda:90 gqa bits 3: found 5.625 instructions per element, allowed 5.5",
        "decode cuda:90 gqa bits 3: found 8 bytes of stack, allowed 0",
        "decode cuda:90 gqa bits 3: found 40001 bytes of shared memory, allowed 40000",
    ]
    full = 163 * 1024
    assert kernel_code.check(measured(Target.CUDA_80, 99, 128, full), second) == []
    assert kernel_code.check(measured(Target.CUDA_80, 99, 128, full + 1), second) == [
        f"decode cuda:80 gqa bits 3: found {full + 1} bytes of shared memory, the device has {full}"
    ]
    with pytest.raises(ValueError, match="Measured for cuda:80"):
        kernel_code.check(measured(Target.CUDA_80, 1, 0, 0), first)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["decode,cuda:91,gqa,3,5,0,0"], "line 2: 'cuda:91'"),
        (["decode,cuda:90,gqa,3,5,0,0", "decode,cuda:90,gqa,3,6,0,0"], "line 3: a second row"),
        (["decode,cuda:90,gqa,3,many,0,0"], "line 2: .*many"),
    ],
)
def test_wrong_budgets(
    kernel_code: ModuleType, tmp_path: Path, rows: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_code.read_budgets(write(tmp_path / "b.csv", *rows))


def test_budgets_without_a_column(kernel_code: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text("kernel,target,variant,max_stack_bytes\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"max_instructions_per_element.*missing"):
        kernel_code.read_budgets(path)


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted, not compiled"):
        runpy.run_path(str(REPOSITORY / "benchmarks" / "kernel_code.py"))


def test_a_missing_tool_is_named(kernel_code: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_NVDISASM_PATH", "/nowhere/nvdisasm")
    with pytest.raises(RuntimeError, match=r"nvdisasm is needed.*/nowhere/nvdisasm is missing"):
        kernel_code._run_tool("nvdisasm", "-c", cubin=b"")


COMPILE = """
import json
from kernel_code import Target, compile_kernel, instructions_per_element, read_code
from toy_kernel import many_sums, nested_sums

SIGNATURE = {"numbers": "*fp32", "sums": "*fp32", "rows": "i32"}
SPILLING = {"cuda": (2048, {"maxnreg": 24}), "hip": (8192, {"waves_per_eu": 8})}

def code(kernel, constexprs, target, options=None, signature=SIGNATURE):
    compiled = compile_kernel(
        kernel, signature, constexprs, divisible=["numbers", "sums"], target=target,
        num_warps=4, num_stages=1, options=options,
    )
    return read_code(compiled)

results = {}
for target in Target:
    plain, roots = (
        code(
            nested_sums,
            {"weights": None, "stride": 1, "SIZE": 4096, "SQUARE_ROOTS": roots},
            target,
        )
        for roots in (False, True)
    )
    size, options = SPILLING[target.split(":")[0]]
    spilling = code(many_sums, {"SIZE": size}, target, options)
    results[target] = {
        "threads": plain.threads,
        "loops": [loop.name for loop in plain.nest.loops],
        "sources": [loop.source.split(":")[0] for loop in plain.nest.loops],
        "per element": [
            instructions_per_element(
                c.nest, {"0": 10, "0.0": 100}, elements=1000 * 4096, threads=c.threads
            )
            for c in (plain, roots)
        ],
        "registers": plain.registers,
        "stack": [plain.stack_bytes, spilling.stack_bytes],
        "spilled": [plain.spilled_registers, spilling.spilled_registers],
        "on stack": sum(i.pipe == "stack" for l in spilling.nest.loops for i in l.own),
    }
try:
    compile_kernel(many_sums, SIGNATURE, {}, divisible=["SIZE"], target=target,
                   num_warps=4, num_stages=1)
except ValueError as error:
    results["wrong"] = str(error)
print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton and NVIDIA's tools run on Linux")
def test_compiled_for_every_target(kernel_code: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(
        str(REPOSITORY / folder) for folder in ("benchmarks", "tests/support")
    )
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    wrong = results.pop("wrong")
    assert "neither in signature nor in constexprs: SIZE" in wrong
    assert "divisible, but not in signature: SIZE" in wrong
    assert set(results) == set(kernel_code.Target)
    for target, found in results.items():
        assert found["threads"] == (256 if target.startswith("hip") else 128)
        assert found["loops"] == ["0", "0.0"]
        assert found["sources"] == ["toy_kernel.py", "toy_kernel.py"]
        # A square root is one instruction, and there is one for each element of the inner loop.
        plain, roots = found["per element"]
        assert roots - plain == pytest.approx(1)
        assert 0 < plain < 10
        assert 16 < found["registers"] < 128
        assert found["stack"][0] == 0 < found["stack"][1]
        # Before gfx940 spills go through instructions that global memory uses, too.
        assert found["on stack"] > 0 or target == "hip:gfx90a"
        amd = target.startswith("hip")
        assert (
            (found["spilled"][0] == 0 < found["spilled"][1]) if amd else not any(found["spilled"])
        )
