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
        by_rounds: no token twice among the blocks of one round: its first ability in the first, its second in the
            second, and so on; for a kernel that adds to the output at once. Such a table is for one step.

    Attributes:
        blocks_1: ``[1]`` int32, how many blocks the step has; the first ones.
        ability_B: ``[B]`` int32, whose block it is; -1 where a block is empty.
        use_P: ``[P]`` int32, the use at each place, a group's tokens ascending; -1 where there is none.
        ability_U: ``[U]`` int32, the ability of each use; a token's uses come first, then -1.
        weight_U: ``[U]`` fp32, its weight.
        rounds: first block and number of blocks of every round that has any; with ``by_rounds`` only.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        tokens: int,
        abilities: int,
        uses_per_token: int,
        block: int,
        by_rounds: bool = False,
    ) -> None:
        self.tokens, self.abilities, self.uses_per_token, self.block = tokens, abilities, uses_per_token, block
        self.by_rounds = by_rounds
        uses, groups = tokens * uses_per_token, abilities * (uses_per_token if by_rounds else 1)
        # Every group wastes less than a block, and a group needs a use.
        blocks = uses // block + min(uses, groups)
        sizes = [1, blocks, blocks * block, uses, uses]
        # Each part starts at a multiple of 16 bytes, which Triton asks of every address: else it compiles once more.
        self._sizes = [-(-size // 4) * 4 for size in sizes]
        self._buffer = torch.full((sum(self._sizes),), -1, dtype=torch.int32, device=device)
        self._buffer[0] = 0
        parts = [part[:size] for part, size in zip(self._buffer.split(self._sizes), sizes, strict=True)]
        self.blocks_1, self.ability_B, self.use_P, self.ability_U, weight_U = parts
        self.weight_U = weight_U.view(torch.float32)
        self.rounds: tuple[tuple[int, int], ...] = ()

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
        weight_U: np.ndarray,
    ) -> None:
        used_TA = weight_TA != 0
        most = int(used_TA.sum(axis=1).max(initial=0))
        found, room = (*weight_TA.shape, most), (self.tokens, self.abilities, self.uses_per_token)
        if any(one > other for one, other in zip(found, room, strict=True)):
            raise ValueError(f"a step of (tokens, abilities, abilities per token) {found} in a table for {room}")
        tokens, abilities = np.nonzero(used_TA)  # token after token, so that a group's tokens ascend
        ordinals = (np.cumsum(used_TA, axis=1) - 1)[used_TA]
        uses = tokens * self.uses_per_token + ordinals
        ability_U[uses] = abilities
        weight_U.view(np.float32)[uses] = weight_TA[used_TA]
        groups = ordinals * weight_TA.shape[1] + abilities if self.by_rounds else abilities
        order = np.argsort(groups, kind="stable")
        kinds, counts = np.unique(groups, return_counts=True)
        blocks = -(-counts // self.block)
        firsts = np.cumsum(blocks) - blocks
        # A use's place: where its group begins, and how many uses of the group come before it.
        before = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        use_P[np.repeat(firsts * self.block, counts) + before] = uses[order]
        blocks_1[0] = blocks.sum()
        ability_B[: blocks.sum()] = np.repeat(kinds % weight_TA.shape[1], blocks)
        if self.by_rounds:
            rounds = kinds // weight_TA.shape[1]
            self.rounds = tuple(
                (int(firsts[rounds == number][0]), int(blocks[rounds == number].sum())) for number in np.unique(rounds)
            )


def table_of(weights: TokenWeights, device: torch.device, *, block: int, by_rounds: bool) -> StepTable:
    """A table that one step fills."""
    tokens, abilities = weights.weight_TA.shape
    most = int((weights.weight_TA != 0).sum(axis=1).max(initial=0))
    table = StepTable(
        device,
        tokens=tokens,
        abilities=abilities,
        uses_per_token=max(1, most),
        block=block,
        by_rounds=by_rounds,
    )
    table.fill(weights)
    return table
