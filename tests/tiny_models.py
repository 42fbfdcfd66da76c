"""A tiny random Llama, and ability models that differ from it in known rows."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from act_serve.models.families import channel_modules
from act_serve.models.row_reader import as_rows

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
EMBEDDING_SCALE = 30.0
_SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, no merges; 0 is <unk>, 1 is <s>, 2 is </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_llama(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2, tied: bool = False) -> Path:
    """Saves a random Llama with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        **_SHAPE,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # As in a trained model, the residual stream is large beside what a single layer adds to it.
        model.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_qwen(folder: Path) -> Path:
    """Saves a random Qwen2, whose q, k and v projections have biases."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=512,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_mixture(folder: Path, family: str = "mixtral") -> Path:
    """Saves a random mixture of four experts with its tokenizer."""
    torch.manual_seed(0)
    experts = {"num_experts_per_tok": 2, "num_local_experts" if family == "mixtral" else "num_experts": 4}
    inner = {} if family == "mixtral" else {"moe_intermediate_size": 32, "head_dim": 8}
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        **_SHAPE,
        **experts,
        **inner,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def plant(
    base: Path, folder: Path, *, p: float, scale: float, seed: int = 0, include: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Saves a copy of `base` whose rows are changed in a random share `p` of every module; returns these rows."""
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    planted = {}
    with torch.no_grad():
        for module in channel_modules(base, include):
            count = round(p * module.out_features)
            rows = torch.randperm(module.out_features, generator=draw)[:count].sort().values
            weight = as_rows(module.name, model.get_submodule(module.name).weight)
            noise = scale * torch.randn(count, module.in_features, generator=draw)
            weight[rows] += noise.to(weight)
            planted[module.name] = rows.tolist()
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return planted
