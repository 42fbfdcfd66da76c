"""The operation of linear layers and lm_head, in a plain reference and in fast forms that are tested against it.

Shape suffixes in this folder and in ``act_serve.engine``:

    T  tokens of this step        I  input features of the layer     O  output features (channels) of the layer
    N  rows of all packed abilities, one after the other             A  packed abilities

The operation adds each token's weighted ability rows to its output, in place::

    y_TO[t, rows_N[n]] += weight_TA[t, owner_N[n]] * (x_TI[t] · delta_NI[n] + bias_N[n])

Norms and the embedding, which read something else than x (``act_serve.delta.channels``), have a reference and a form in
torch each.
"""
