"""T5 text encoders."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encoders.loading import FrozenEncoder, Pretrained, absolute, identity, in_turn

TEXT = Pretrained(
    option="--text",
    files="config.json, model.safetensors and tokenizer.json",
    class_name="T5EncoderModel",
    kinds=("t5",),
    attention="eager",
)
MAX_TOKENS = 512  # Of a caption, the end of sequence included.
_MAX_BATCH_TOKENS = 16 * MAX_TOKENS  # That a network sees at once, padding included.


class TextEncoder(FrozenEncoder):
    """The encoder half of a T5 with its tokenizer: captions to hidden states (arXiv:1910.10683).

    In bfloat16, its matrices are stored so too, which halves its memory.

    Attributes:
        dim: Channels T of a hidden state.
        max_tokens: Most tokens of a caption, the end of sequence included.
    """

    described = ("dim", "max_tokens")

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        location: str,
        device: torch.device | str,
        precision: str = "fp32",
    ) -> None:
        """``network`` is a ``transformers.T5EncoderModel``; raises ValueError if both do not fit.

        ``tokenizer`` is a fast tokenizer of transformers.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"--text: {location} has no fast tokenizer; add its tokenizer.json to the folder."
            )
        if len(tokenizer) > network.config.vocab_size:
            raise ValueError(
                f"--text: {location} has a tokenizer of {len(tokenizer)} tokens, but the network "
                f"knows {network.config.vocab_size}; put the tokenizer of this network there."
            )
        self.dim = int(network.config.d_model)
        self.max_tokens = MAX_TOKENS
        self._tokenizer = tokenizer
        sha256 = identity(network, tokenizer.backend_tokenizer.to_str())
        if precision == "bf16":
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        super().__init__(network, location, device, precision, sha256)

    def tokenize(self, captions: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the tokens of each caption, and whether it had more than are kept.

        Of those that had, the last token is the end of sequence, if the tokenizer adds one.
        Raises ValueError for a caption without any token.
        """
        if not len(captions):
            return [], []
        rows = self._tokenizer(list(captions), truncation=False, padding=False)["input_ids"]
        truncated = [len(row) > self.max_tokens for row in rows]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(
                    f"--text: the tokenizer of {self.location} gives no token for the caption "
                    f"{captions[index]!r}; use one that adds an end of sequence."
                )
            if truncated[index]:
                end = row[-1:] if row[-1] == self._tokenizer.eos_token_id else []
                rows[index] = row[: self.max_tokens - len(end)] + end
        return rows, truncated

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Return hidden states [N, L, T], float32, a mask [N, L] of them, and a number.

        L is the largest number of tokens among the captions. The mask is True where there is a
        token; other hidden states are zero. The number is of the captions that were cut to
        ``max_tokens``.
        """
        rows, truncated = self.tokenize(captions)
        longest = max(map(len, rows), default=0)
        ids = torch.zeros((len(rows), longest), dtype=torch.int64)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        ids, mask = ids.to(self.device), mask.to(self.device)
        shape = (*ids.shape, self.dim)
        hidden = torch.empty(shape, dtype=torch.float32, device=self.device)
        size = max(_MAX_BATCH_TOKENS // max(longest, 1), 1)
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            # With bfloat16, sums and norms between the matrices are in float32 all the same.
            with self._products():
                out = self._network(input_ids=ids[part], attention_mask=mask[part].long())
            hidden[part] = out.last_hidden_state
        return hidden.masked_fill_(~mask[:, :, None], 0), mask, sum(truncated)


def load_text_encoder(
    location: str,
    device: torch.device | str,
    *,
    expected_hash: str | None = None,
    precision: str = "fp32",
) -> TextEncoder:
    """Return a text encoder and its tokenizer, as :func:`load_visual_encoder`. Collective."""
    location = absolute(location)

    def read() -> TextEncoder:
        network = TEXT.read(location)
        with TEXT.using(location) as transformers:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                location, trust_remote_code=False
            )
        return TextEncoder(network, tokenizer, location, device, precision)

    encoder = in_turn(read)
    TEXT.check_identity(encoder, expected_hash)
    return encoder
