from __future__ import annotations

import pytest
import torch

from kvq_formats.codebook import LEVELS, Codebook


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_counts_the_midpoints_below(bits: int) -> None:
    entries = torch.sort(torch.randn(1 << bits)).values
    codebook = Codebook.fit_grid(entries)
    assert codebook.bits == bits
    z = torch.cat([torch.randn(500) * 2, codebook.midpoints])
    counted = (z[:, None] > codebook.midpoints).sum(-1)
    codes = codebook.encode(z)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), counted)
    # Nearest entry, where that is not a tie.
    distance = (z[:500, None] - entries).abs()
    assert torch.equal(distance.argmin(-1), codes[:500].long())


def test_snapped_entries_stay_within_half_a_step() -> None:
    entries = torch.tensor([-0.93, -0.5, -0.1, 0.87])
    codebook = Codebook.fit_grid(entries)
    assert codebook.levels[0] == 0
    assert codebook.levels[-1] == LEVELS
    # Half a step, and one f32 rounding of offset, step and their product each.
    bound = codebook.step / 2 + 4 * torch.finfo(torch.float32).eps
    assert (codebook.decode_entries - entries).abs().max() <= bound
    assert codebook.step == pytest.approx(1.8 / 255)


def test_qnorm_moves_what_is_decoded_and_not_the_codes() -> None:
    entries = torch.linspace(-0.9, 0.9, 8)
    plain, normed = (
        Codebook.fit_grid(entries),
        Codebook.fit_grid(entries, qnorm_scale=1.1, qnorm_shift=0.05),
    )
    z = torch.linspace(-1.2, 1.2, 101)
    assert torch.equal(plain.encode(z), normed.encode(z))
    moved = entries * 1.1 + 0.05
    assert (normed.decode(normed.encode(entries)) - moved).abs().max() <= normed.step / 2 + 1e-6
