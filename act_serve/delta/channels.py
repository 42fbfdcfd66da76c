"""What a channel is in each kind of module; a module's name in the checkpoint decides its kind, here and nowhere else.

A channel c is an output dimension of a module, and an ability's row Δ_c is what is added for it, with weight w::

    y[t, c] += w · (u_t · Δ_c)

=============  ============================================  =======================================================
kind           u_t, what channel c reads of token t          where c lies in the stored weight
=============  ============================================  =======================================================
``linear``     the module's input                            a row of ``[O, I]``
``lm_head``    the last hidden state                         a row of ``[V, H]``; y are the logits
``norms``      x̂[t, c], the normalised input before γ: I=1   an entry of γ ``[H]``
``embedding``  the token's id, one-hot: I=V                  a column of ``[V, H]``
=============  ============================================  =======================================================

Where a checkpoint ties lm_head to the embedding, an ability is served as if it did not: rows of lm_head change the
logits alone, and columns of the embedding the inputs alone.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["linear", "lm_head", "norms", "embedding"]

LM_HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
# Outside the linear modules of the layers: what a profile may `include`.
OUTSIDE: tuple[Kind, ...] = ("norms", "lm_head", "embedding")
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"})


def kind_of(module: str) -> Kind:
    """The kind of the module with this name in the checkpoint, such as ``model.layers.0.input_layernorm``."""
    if module == LM_HEAD:
        return "lm_head"
    if module == EMBEDDING:
        return "embedding"
    return "norms" if module.rpartition(".")[2] in _NORMS else "linear"
