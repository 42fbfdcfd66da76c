"""Every error that act-serve raises on purpose, as one tree.

::

    ActServeError                  anything below; the message says what happened, where, and what to do
    ├── MissingExtraError          an optional dependency is not installed
    ├── ProfileError               a profile file is wrong
    ├── DataError                  a data set is missing, empty or malformed
    ├── ModelError                 a model folder cannot be read or is of an unsupported family
    │   └── PairMismatchError      base and ability model are not the same architecture, tokenizer or shapes
    ├── BuildError                 a build could not finish
    │   ├── RetentionError         the delta costs a retained task more than its profile allows
    │   └── GainError              no share of channels keeps enough of what the source model gained
    ├── StoreError                 the ability store cannot be read or written
    ├── ArtifactError              an ability artifact cannot be used
    │   ├── ArtifactDamagedError   files, hashes, shapes or rows are not what the manifest promises
    │   └── BaseMismatchError      the artifact was built for another base model
    ├── EngineError                the engine could not apply what it was asked to apply
    └── RequestError               a request is malformed
        ├── AuthenticationError    the server needs an API key, and the request has none that it knows
        ├── PermissionDeniedError  the key lacks a role, or may not use an ability
        ├── UnknownAbilityError    the request names an ability, version, language or skill that is not here
        ├── ExistsError            the store has that already, or it is in use
        ├── ArchiveError           an uploaded archive or its source is not an ability's files and nothing else
        ├── TooLargeError          the body is larger than the server accepts
        ├── OverloadedError        every queue is full: try again later
        │   └── RateLimitError     the key has used up its requests for now
        └── NotReadyError          the server is still starting, or no replica is alive

``http_status`` is what the server answers when the error reaches a request; ``exit_code`` is what the
command line returns (documented in docs/operating.md).
"""

from __future__ import annotations

from typing import ClassVar


class ActServeError(Exception):
    """Base of every error raised on purpose."""

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1


class MissingExtraError(ActServeError):
    """An optional dependency is not installed.

    Args:
        module: the module that could not be imported.
        extra: the extra of this package that brings it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'act-serve[{extra}]'")


class ProfileError(ActServeError):
    """A profile file is wrong."""

    exit_code = 2


class DataError(ActServeError):
    """A data set is missing, empty or malformed."""

    exit_code = 2


class ModelError(ActServeError):
    """A model folder cannot be read, or its family is not supported."""

    exit_code = 2


class PairMismatchError(ModelError):
    """Base and ability model differ in architecture, tokenizer or shapes."""


class BuildError(ActServeError):
    """A build could not finish; finished stages are kept, so that running it again resumes."""

    exit_code = 3


class RetentionError(BuildError):
    """The delta costs a retained task more than the profile allows; nothing was published."""

    exit_code = 4


class GainError(BuildError):
    """No share of channels that was tried keeps enough of the source model's gain; nothing was published."""

    exit_code = 4


class StoreError(ActServeError):
    """The ability store cannot be read or written."""

    http_status = 503


class ArtifactError(ActServeError):
    """An ability artifact cannot be used."""

    http_status = 422
    exit_code = 5


class ArtifactDamagedError(ArtifactError):
    """Files, hashes, shapes or rows are not what the manifest promises."""


class BaseMismatchError(ArtifactError):
    """The artifact was built for another base model."""

    http_status = 409


class EngineError(ActServeError):
    """The engine could not apply what it was asked to apply."""


class RequestError(ActServeError):
    """A request is malformed.

    Args:
        message: what is wrong and what to send instead.
        param: the body field that is wrong, as in OpenAI's error object.
    """

    http_status = 400
    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AuthenticationError(RequestError):
    """The server needs an API key, and the request has none that it knows."""

    http_status = 401


class PermissionDeniedError(RequestError):
    """The request's key lacks the role that the route needs, or may not use an ability that the request names."""

    http_status = 403


class UnknownAbilityError(RequestError):
    """The request names an ability, version, language or skill that this server does not have."""

    http_status = 404


class ExistsError(RequestError):
    """The store has that version already, or it is in use, so that it cannot be added or removed."""

    http_status = 409


class ArchiveError(RequestError):
    """An uploaded archive, or where an ability is to be fetched from, is not an ability's files and nothing else."""


class TooLargeError(RequestError):
    """The request body is larger than the server accepts."""

    http_status = 413


class OverloadedError(RequestError):
    """Every queue is full; the client should retry after ``retry_after_s`` seconds."""

    http_status = 429

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    """The request's key has used up its requests for now."""


class NotReadyError(RequestError):
    """The server is still starting, or no engine replica is alive."""

    http_status = 503
