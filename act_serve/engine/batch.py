"""Which tokens of this step use which ability with which weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from act_serve.engine.ability_key import AbilityKey
from act_serve.kernels.rows import TokenWeights


class StepCode(Enum):
    """What a step needs of the model's code."""

    BASE = auto()  # no token uses an ability
    ROWS = auto()
    UNCOMPILED = auto()  # some ability has rows that are in no compiled code


@dataclass(slots=True)
class BatchTable:
    """The weights of one step, shared by all layers and replaced before every step.

    Attributes:
        abilities: the A abilities that some token uses; the same object as long as they stay the same.
        weights: of every token on each of them; None when no token uses any.
        code: what the step needs of the model's code.
        choose: is called with that, whenever it is not as in the step before.
    """

    abilities: tuple[AbilityKey, ...] = ()
    weights: TokenWeights | None = None
    code: StepCode = StepCode.BASE
    choose: Callable[[StepCode], None] | None = None
    _compositions: Mapping[int, Mapping[AbilityKey, float]] = field(default_factory=dict)
    _sampled_ids: Sequence[int] = ()
    _sampled: TokenWeights | None = None
    _taken: bool = False

    def begin_step(self) -> None:
        """The coming logits are those that tokens are sampled from; whatever the tables hold, old or new."""
        self._taken = False

    def take_sampled(self) -> TokenWeights | None:
        """The weights of the positions that the step samples from, for whoever asks first; None for those after.

        vLLM's model runner computes these logits first. Those that it computes later in a step are of prompts whose
        ``prompt_logprobs`` are asked for, one request at a time, and it does not say whose.
        """
        if self._taken or self.weights is None:
            return None
        self._taken = True
        if self._sampled is None:
            self._sampled = self._weights_of(self._sampled_ids)
        return self._sampled

    def clear(self) -> None:
        """No token of the step uses an ability."""
        self._set(None, StepCode.BASE)

    def fill(
        self,
        ids_T: Sequence[int],
        compositions: Mapping[int, Mapping[AbilityKey, float]],
        sampled_ids: Sequence[int] = (),
        code: StepCode = StepCode.ROWS,
    ) -> None:
        """Sets the step's weights.

        Args:
            ids_T: adapter id of each token, 0 for the base model.
            compositions: per adapter id in the batch, its abilities' weights.
            sampled_ids: adapter id of each position that a token is sampled from.
            code: what these abilities need.
        """
        abilities = tuple(sorted({key for weights in compositions.values() for key in weights}))
        if abilities != self.abilities:
            self.abilities = abilities
        self._compositions, self._sampled_ids, self._sampled = compositions, sampled_ids, None
        self._set(self._weights_of(ids_T), code)
        if sampled_ids == ids_T:  # as in every step that only decodes: the kernels' tables are made once
            self._sampled = self.weights

    def _set(self, weights: TokenWeights | None, code: StepCode) -> None:
        if self.choose is not None and code is not self.code:
            self.choose(code)
        self.weights, self.code = weights, code

    def _weights_of(self, adapter_ids: Sequence[int]) -> TokenWeights:
        ids, inverse_T = np.unique(np.asarray(adapter_ids, dtype=np.int64), return_inverse=True)
        table = np.zeros((len(ids), len(self.abilities)), dtype=np.float32)
        for row, adapter_id in enumerate(ids.tolist()):
            of = self._compositions.get(adapter_id, {})
            table[row] = [of.get(key, 0.0) for key in self.abilities]
        return TokenWeights(table[inverse_T])
