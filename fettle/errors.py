"""Every error that Fettle raises on purpose, as one small tree.

Each class carries the HTTP status and the `type` that a client sees, so the HTTP border needs one handler.
The message is always public: it names what is wrong and what to do. What is private (paths of the server,
stack traces) never goes into a message of a `RequestError`.
"""

from __future__ import annotations

# Characters of a message.
LONGEST = 800


class FettleError(Exception):
    """Base of all. `param` names the field at fault, if there is one; `code` is a stable machine word."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, str | None]]:
        """The reply's body in the shape the OpenAI API documents: `{"error": {...}}`.

        What a client sent may stand in message and param, but not at any length.
        """
        message, param = shortened(self.message), None if self.param is None else shortened(self.param)
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}


# Offline: the family, the data, the machine.


class FamilyError(FettleError):
    """The family directory cannot be used: missing, damaged, or written by another version."""

    code = "bad_family"


class IntegrityError(FamilyError):
    """A file is missing or its content is not what the manifest says."""

    code = "integrity"


class DataError(FettleError):
    """The user's data file cannot be read as what it should be."""

    code = "bad_data"


class ModelError(FettleError):
    """The user's model cannot be loaded or is of a kind that Fettle does not serve."""

    code = "bad_model"


class PassError(FettleError):
    """A pass could not make its variant; the others go on."""

    code = "pass_failed"


class QualityError(FettleError):
    """What is known of a family's promises cannot be kept, read, or does not suffice."""

    code = "quality"


class KeyFileError(FettleError):
    """The file of API keys cannot be used."""

    code = "bad_keys"


class BusyError(FettleError):
    """Another run holds the directory."""

    code = "busy"


class UsageError(FettleError):
    """A command or a configuration asks for something that does not fit."""

    code = "usage"


# Online: one request.


class RequestError(FettleError):
    """The client's request cannot be answered as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class AuthError(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """A request that did not come the way that requests come."""

    status = 403
    type = "permission_error"
    code = "not_through_the_proxy"


class UnknownModelError(RequestError):
    status = 404
    type = "not_found_error"
    code = "model_not_found"


class TooLargeError(RequestError):
    status = 413
    code = "too_large"


class SlowBodyError(RequestError):
    """The body was not complete in time."""

    status = 408
    code = "timeout"


class EncodingError(RequestError):
    """The body is compressed, and what it unpacks to is not to be found out."""

    status = 415
    code = "unsupported_encoding"


class ContextLengthError(RequestError):
    """A prompt, with the answer that was asked for, is longer than the model's context."""

    code = "context_length_exceeded"


class OverloadedError(FettleError):
    """Refused at admission; `retry_after_s` is when the queue will have drained, in seconds."""

    status = 429
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """A key has more under way, or sends more tokens, than its limits allow."""

    code = "rate_limited"


class QuotaError(RateLimitedError):
    """What a key may take on a day or in a month is used up."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class DeadlineError(FettleError):
    """The reply cannot be out, or was not, before the request's own deadline."""

    status = 504
    type = "deadline_error"
    code = "deadline"


class UnavailableError(FettleError):
    """No replica could answer, after the retries."""

    status = 503
    type = "unavailable_error"
    code = "unavailable"


class EngineError(FettleError):
    """The engine failed on these rows; another row of the same batch may well be fine."""

    code = "engine_failed"


def shortened(text: str) -> str:
    """At most LONGEST characters of it, from its beginning and its end."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 5]} ... {text[-half:]}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
