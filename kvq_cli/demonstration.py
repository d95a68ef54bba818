"""The last part of ``kvq demo``: text generated on the packed cache, and what that cache held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq_cli.generation import Holding, stream_text
from kvq_cli.output import Output, table
from kvq_cli.sizes import show_bytes
from kvq_runtime.sampling import Sampling

if TYPE_CHECKING:
    from rich.table import Table

    from kvq_calibration.data import TokenWindows
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.generate import Generation
    from kvq_runtime.models import LoadedModel

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
"""Greedy text of a model of this size repeats itself."""

SHOWN_TOKENS = 12
"""Tokens of the prompt's end that are printed before its continuation."""


@dataclass(frozen=True)
class Demonstration:
    """One generation.

    Fields:
        name: of the sidecar.
        prompt: the text that was continued.
        generation: what came out.
        holding: what the cache held then.
        kl: to the unquantized model, mean over the tokens held, nats.
        agreement: share of these tokens after which both find the same token likeliest.
    """

    name: str
    prompt: TokenWindows
    generation: Generation
    holding: Holding
    kl: float
    agreement: float

    def table(self) -> Table:
        """The packed cache beside one of 16 bits."""
        held, rate = self.holding, self.generation.tokens_per_second
        bits = held.effective_bits
        caption = "One page of 256 tokens is always exact: the more tokens, the less it weighs."
        if rate is not None:
            caption += f"\nGenerated at {rate:.1f} tokens a second (wall clock)."
        return table(
            ("cache", "tokens", "bytes", "bits eff", "KL", "agree"),
            [
                ("bf16", f"{held.tokens:,}", show_bytes(held.bf16), "16.00", "", ""),
                (
                    self.name,
                    f"{held.tokens:,}",
                    show_bytes(held.held),
                    "" if bits is None else f"{bits:.2f}",
                    f"{self.kl:.5f}",
                    f"{100 * self.agreement:.2f} %",
                ),
            ],
            title="Held when the text was complete",
            caption=caption,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rate = self.generation.tokens_per_second
        return {
            "prompt": self.prompt.name,
            "prompt_tokens": self.generation.prompt_tokens,
            "generated_tokens": len(self.generation.token_ids),
            "text": self.generation.text,
            "sampling": SAMPLING.to_json(),
            **self.holding.to_json(),
            "kl": self.kl,
            "agreement": self.agreement,
            "decode_tokens_per_second": None if rate is None else round(rate, 3),
        }


def demonstrate(
    output: Output,
    loaded: LoadedModel,
    name: str,
    sidecar: Sidecar,
    prompt: TokenWindows,
    *,
    new_tokens: int,
) -> Demonstration:
    """Continue the first window of ``prompt``, printing the text as it comes, and measure it."""
    import torch

    from kvq_evaluation.perplexity import evaluate
    from kvq_runtime.attach import attach
    from kvq_runtime.cache import PackedCache
    from kvq_runtime.generate import PREFILL_CHUNK

    model, input_ids = loaded.model, prompt.input_ids[:1]
    tokens = input_ids.shape[1]
    end = loaded.tokenizer.decode(input_ids[0, -SHOWN_TOKENS:])
    output.stream(f"{tokens:,} tokens of {prompt.name}, continued on the packed cache:\n\n…{end}")
    with attach(model, sidecar):
        cache = PackedCache(model, sidecar, capacity=tokens + new_tokens)
        generation = stream_text(
            output,
            loaded,
            input_ids,
            cache,
            new_tokens=new_tokens,
            prefill_chunk=PREFILL_CHUNK,
            sampling=SAMPLING,
        )
        holding = Holding.of(cache)
    output.stream("\n\n")
    text = torch.cat([input_ids, torch.tensor([generation.token_ids])], dim=1)
    # One forward gives the logits that decoding gave: that is the runtime rule.
    _, packed = evaluate(model, text, variants={name: lambda: attach(model, sidecar)})
    return Demonstration(
        name, prompt, generation, holding, packed.mean_kl.mean, packed.mean_agreement
    )
