"""A step's weights as a kernel on a GPU reads them, at addresses that outlive the step.

Shapes: T tokens, A abilities, R abilities that one token may use at once, U = T * R uses, B blocks of some places, P
places in all. A *use* is a token with one of its abilities; use ``t * R + n`` is token t's n-th.
"""

from __future__ import annotations

import numpy as np
import torch

from act_serve.kernels.rows import TokenWeights
from act_serve.kernels.to_device import copy_in_order

# Places of a block in the tables of CUDA graphs: the fewest that a tensor core multiplies at once.
GRAPH_BLOCK = 16
# Steps up to so many tokens have few uses per ability, and take the smallest blocks; longer ones larger.
SHORT_TOKENS, LONG_TOKENS = 512, 4096


class StepTable:
    """The uses of one step, grouped by ability: every block of places belongs to one ability.

    All lies in one buffer on the device that never moves, and its size depends on the arguments here alone. So a CUDA
    graph that was captured with a table replays with whatever :meth:`fill` put there since.

    Args:
        device: where the kernel runs.
        tokens: the most tokens of a step, T.
        abilities: the most abilities of a step, A.
        uses_per_token: the most abilities of one token, R.
        block: places of a block; a power of two.

    Attributes:
        blocks_1: ``[1]`` int32, how many blocks the step has; the first ones.
        ability_B: ``[B]`` int32, whose block it is; -1 where a block is empty.
        use_P: ``[P]`` int32, the use at each place, a group's tokens ascending; -1 where there is none.
        ability_U: ``[U]`` int32, the ability of each use; a token's uses come first, then -1.
        slot_U: ``[U]`` int32, its number among the step's uses, token after token, without gaps.
        weight_U: ``[U]`` fp32, its weight.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        tokens: int,
        abilities: int,
        uses_per_token: int,
        block: int,
    ) -> None:
        self.tokens, self.abilities, self.uses_per_token, self.block = tokens, abilities, uses_per_token, block
        uses = tokens * uses_per_token
        # Every ability wastes less than a block, and needs a use.
        blocks = uses // block + min(uses, abilities)
        sizes = [1, blocks, blocks * block, uses, uses, uses]
        # Each part starts at a multiple of 16 bytes, which Triton asks of every address: else it compiles once more.
        self._sizes = [-(-size // 4) * 4 for size in sizes]
        self._buffer = torch.full((sum(self._sizes),), -1, dtype=torch.int32, device=device)
        self._buffer[0] = 0
        parts = [part[:size] for part, size in zip(self._buffer.split(self._sizes), sizes, strict=True)]
        self.blocks_1, self.ability_B, self.use_P, self.ability_U, self.slot_U, weight_U = parts
        self.weight_U = weight_U.view(torch.float32)

    def fill(self, weights: TokenWeights | None) -> None:
        """Replaces the step by another, with one copy to the device, on the stream that kernels are launched on.

        Args:
            weights: None: no token uses an ability.

        Raises:
            ValueError: the step is larger than the table.
        """
        host = self._empty()
        if weights is not None:
            self._write(weights.weight_TA, *np.split(host, np.cumsum(self._sizes)[:-1]))
        copy_in_order(self._buffer, host)

    def _empty(self) -> np.ndarray:
        host = np.full(sum(self._sizes), -1, dtype=np.int32)
        host[0] = 0
        return host

    def _write(
        self,
        weight_TA: np.ndarray,
        blocks_1: np.ndarray,
        ability_B: np.ndarray,
        use_P: np.ndarray,
        ability_U: np.ndarray,
        slot_U: np.ndarray,
        weight_U: np.ndarray,
    ) -> None:
        used_TA = weight_TA != 0
        most = int(used_TA.sum(axis=1).max(initial=0))
        size, room = (*weight_TA.shape, most), (self.tokens, self.abilities, self.uses_per_token)
        if any(one > other for one, other in zip(size, room, strict=True)):
            raise ValueError(f"a step of (tokens, abilities, abilities per token) {size} in a table for {room}")
        tokens, abilities = np.nonzero(used_TA)  # token after token, so that a group's tokens ascend
        ordinals = (np.cumsum(used_TA, axis=1) - 1)[used_TA]
        uses = tokens * self.uses_per_token + ordinals
        ability_U[uses] = abilities
        slot_U[uses] = np.arange(len(uses))
        weight_U.view(np.float32)[uses] = weight_TA[used_TA]
        order = np.argsort(abilities, kind="stable")
        found, counts = np.unique(abilities, return_counts=True)
        blocks = -(-counts // self.block)
        firsts = np.cumsum(blocks) - blocks
        # A use's place: where its ability begins, and how many uses of the ability come before it.
        before = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        use_P[np.repeat(firsts * self.block, counts) + before] = uses[order]
        blocks_1[0] = blocks.sum()
        ability_B[: blocks.sum()] = np.repeat(found, blocks)


def table_of(weights: TokenWeights, device: torch.device, *, block: int | None = None) -> StepTable:
    """A table that one step fills, by default in the blocks that suit its length."""
    tokens, abilities = weights.weight_TA.shape
    most = int((weights.weight_TA != 0).sum(axis=1).max(initial=0))
    table = StepTable(
        device, tokens=tokens, abilities=abilities, uses_per_token=max(1, most), block=block or block_for(tokens)
    )
    table.fill(weights)
    return table


def block_for(tokens: int) -> int:
    """The places of a block, in the table of a step of so many tokens that no graph holds."""
    return GRAPH_BLOCK if tokens <= SHORT_TOKENS else 64 if tokens <= LONG_TOKENS else 128
