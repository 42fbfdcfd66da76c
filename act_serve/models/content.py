"""All that a model and its tokenizer are read from, by one key. The fingerprint of a manifest is a sample of it."""

import hashlib
from pathlib import Path

from act_serve.delta.file_hashes import file_sha256
from act_serve.errors import ModelError

# Weights and their index, the configs of model, generation and tokenizer, vocabularies, chat templates.
_READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")


def content_key(folder: Path) -> str:
    """A sha256 over the files in `folder` that models and tokenizers are loaded from, all bytes of them.

    A file is read once and its hash remembered until it changes. Raises ModelError when one can't be read.
    """
    key = hashlib.sha256()
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        try:
            key.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
        except OSError as exc:
            raise ModelError(f"{path} can't be read: {exc.strerror or exc}") from exc
    return key.hexdigest()
