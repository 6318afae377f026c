"""The text encoder, from Hugging Face's transformers: the encoder of a T5."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.errors import refusal
from encoders.loading import Device, FrozenEncoder, Pretrained, absolute, identity
from torch_utils.distributed import in_turn

TEXT = Pretrained(
    option="--text",
    files="config.json, model.safetensors and tokenizer.json",
    class_name="T5EncoderModel",
    kinds=("t5",),
    attention="eager",
)
MAX_TOKENS = 512  # Most tokens of a caption, including the end of sequence.
_MAX_BATCH_TOKENS = 16 * MAX_TOKENS  # Per pass of the network, including padding.


class TextEncoder(FrozenEncoder):
    """The encoder of a T5 (arXiv:1910.10683) and its tokenizer: maps captions to hidden states.

    With precision ``bf16``, its matrices are also stored in bfloat16, which halves its memory.

    Attributes:
        dim: Width T of a hidden state.
        max_tokens: Most tokens of a caption, including the end of sequence.
    """

    described = ("dim", "max_tokens")

    def __init__(
        self, network: nn.Module, tokenizer: Any, location: str, device: Device, precision: str
    ) -> None:
        """``network`` is a ``transformers.T5EncoderModel``, ``tokenizer`` its fast tokenizer.

        Raises ValueError for a slow tokenizer, or one with more tokens than the network knows.
        """
        num_tokens, num_known = len(tokenizer), network.config.vocab_size
        if not tokenizer.is_fast:
            remedy = "add its tokenizer.json to the folder"
            raise refusal("--text", but=f"{location} has no fast tokenizer", remedy=remedy)
        if num_tokens > num_known:
            problem = f"a tokenizer of {num_tokens} tokens, but the network knows {num_known}"
            remedy = "put the tokenizer of this network there"
            raise refusal("--text", but=f"{location} has {problem}", remedy=remedy)
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
        """Return the token ids of each caption, and whether the caption was truncated.

        A truncated caption still ends in the end of sequence, if the tokenizer adds one. Raises
        ValueError for a caption without any token.
        """
        if not len(captions):
            return [], []
        rows = self._tokenizer(list(captions), truncation=False, padding=False)["input_ids"]
        truncated = [len(row) > self.max_tokens for row in rows]
        for index, row in enumerate(rows):
            if not row:
                problem = f"the tokenizer of {self.location} gives no token for the caption "
                remedy = "use one that adds an end of sequence"
                raise refusal("--text", but=f"{problem}{captions[index]!r}", remedy=remedy)
            if truncated[index]:
                end = row[-1:] if row[-1] == self._tokenizer.eos_token_id else []
                rows[index] = row[: self.max_tokens - len(end)] + end
        return rows, truncated

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Return hidden states [N, L, T], their mask [N, L], and the number of truncated captions.

        L is the largest number of tokens in a caption. Hidden states are float32 on the encoder's
        device. The mask is bool, True where there is a token; elsewhere hidden states are zero.
        """
        rows, truncated = self.tokenize(captions)
        longest = max(map(len, rows), default=0)
        tokens = torch.zeros((len(rows), 2, longest), dtype=torch.int64)  # Ids and mask.
        for index, row in enumerate(rows):
            tokens[index, :, : len(row)] = torch.tensor([row, [1] * len(row)])
        tokens = tokens.to(self.device)

        def states(tokens: Tensor) -> Tensor:
            ids, mask = tokens.unbind(dim=1)
            # Even with bfloat16 matrices, sums and norms between them are in float32.
            with self._products():
                return self._network(input_ids=ids, attention_mask=mask).last_hidden_state

        size = _MAX_BATCH_TOKENS // max(longest, 1)
        hidden, mask = self._in_chunks(states, tokens, size, (longest, self.dim)), tokens[:, 1] > 0
        return hidden.masked_fill_(~mask[:, :, None], 0), mask, sum(truncated)


def load_text_encoder(
    location: str, device: Device, *, expected_hash: str | None = None, precision: str = "fp32"
) -> TextEncoder:
    """Return a text encoder with its tokenizer. Collective.

    Arguments and errors are those of :func:`~encoders.visual.load_visual_encoder`.
    """
    location = absolute(location)

    def make() -> TextEncoder:
        network = TEXT.read(location)
        with TEXT.using(location) as transformers:
            read = transformers.AutoTokenizer.from_pretrained
            tokenizer = read(location, trust_remote_code=False)
        return TextEncoder(network, tokenizer, location, device, precision)

    return TEXT.checked(in_turn(make), expected_hash)
