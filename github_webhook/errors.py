"""What can go wrong with a forge, one class per failure a caller can act on.

    DeliveryRefused          an incoming delivery that is answered with a problem document
    ├── HeaderMissing          400  no event, no delivery id, or one that is malformed
    ├── BodyIncomplete         400  the sender went away in the middle of the body
    ├── PayloadNotJson         400  truncated or not JSON at all
    ├── SignatureMissing       401  no X-Hub-Signature-256
    ├── SignatureInvalid       401  made with none of our secrets
    ├── BodyTimeout            408  the body did not arrive in time
    ├── PayloadTooLarge        413  above the cap
    ├── MediaTypeUnsupported   415  the hook is not set to application/json
    ├── PayloadInvalid         422  JSON, but not the shape GitHub documents
    ├── UnknownEvent           422  an event this service has no use for
    ├── ReceiverBusy           503  too many deliveries, or bytes of them, are held at once
    └── InboxUnavailable       503  it could not be written down: GitHub shows it as failed
    ForgeError               an outgoing call that did not do what was asked
    ├── Unauthorized           401  credentials are wrong, revoked or expired
    ├── Forbidden              403  a permission is missing
    │   └── Suspended                the App's installation is suspended
    ├── NotFound               404  no such thing, or not visible to these credentials
    │   └── NotInstalled             the App is not installed there
    ├── Conflict               409  the name exists already
    ├── Unprocessable          422  the forge understood and refuses
    ├── RateLimited            403/429 with ``retry_at``
    ├── Unavailable            5xx, network, time-out: it may have happened or not
    └── AnswerInvalid          an answer that is none: not JSON, wrong shape, too large
    JitConfigInvalid         a just-in-time configuration that is not the three files

Every class has a stable ``code``: the log key, the metric label and the problem type.
No message here ever holds a body, a token or a configuration.
"""

from typing import ClassVar


class DeliveryRefused(Exception):
    """Root of the refusals. ``status`` is the HTTP status of the answer; the message is its detail.

    ``retry_after``: after how many seconds the same delivery may well be taken, when it may at all.
    """

    code: ClassVar[str] = "delivery_refused"
    status: ClassVar[int] = 400
    title: ClassVar[str] = "Delivery refused"
    retry_after: ClassVar[int | None] = None


class HeaderMissing(DeliveryRefused):
    code: ClassVar[str] = "header_missing"
    title: ClassVar[str] = "A required header is missing or malformed"


class BodyIncomplete(DeliveryRefused):
    code: ClassVar[str] = "body_incomplete"
    title: ClassVar[str] = "The body ended early"


class PayloadNotJson(DeliveryRefused):
    code: ClassVar[str] = "payload_not_json"
    title: ClassVar[str] = "The body is not JSON"


class SignatureMissing(DeliveryRefused):
    code: ClassVar[str] = "signature_missing"
    status: ClassVar[int] = 401
    title: ClassVar[str] = "The delivery is not signed"


class SignatureInvalid(DeliveryRefused):
    code: ClassVar[str] = "signature_invalid"
    status: ClassVar[int] = 401
    title: ClassVar[str] = "The signature does not fit"


class BodyTimeout(DeliveryRefused):
    code: ClassVar[str] = "body_timeout"
    status: ClassVar[int] = 408
    title: ClassVar[str] = "The body did not arrive in time"


class PayloadTooLarge(DeliveryRefused):
    code: ClassVar[str] = "payload_too_large"
    status: ClassVar[int] = 413
    title: ClassVar[str] = "The body is too large"


class MediaTypeUnsupported(DeliveryRefused):
    code: ClassVar[str] = "media_type_unsupported"
    status: ClassVar[int] = 415
    title: ClassVar[str] = "The body must be application/json"


class PayloadInvalid(DeliveryRefused):
    code: ClassVar[str] = "payload_invalid"
    status: ClassVar[int] = 422
    title: ClassVar[str] = "The payload has not the documented shape"


class UnknownEvent(DeliveryRefused):
    code: ClassVar[str] = "unknown_event"
    status: ClassVar[int] = 422
    title: ClassVar[str] = "Unknown event"


class ReceiverBusy(DeliveryRefused):
    code: ClassVar[str] = "receiver_busy"
    status: ClassVar[int] = 503
    title: ClassVar[str] = "Too many deliveries at once"
    retry_after: ClassVar[int | None] = 10


class InboxUnavailable(DeliveryRefused):
    code: ClassVar[str] = "inbox_unavailable"
    status: ClassVar[int] = 503
    title: ClassVar[str] = "The delivery could not be stored"
    retry_after: ClassVar[int | None] = 10


class ForgeError(Exception):
    """Root of the client's errors.

    ``status`` is the HTTP status (None when there was no answer), ``request_id`` GitHub's own id of the
    exchange for a support request, ``retryable`` whether the same call may succeed later by itself, ``retry_at``
    (Unix seconds) when it may be tried again, if that is known: until then no call is made.
    """

    code: ClassVar[str] = "forge_error"
    retryable: bool

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        retryable: bool = False,
        retry_at: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id
        self.retryable = retryable
        self.retry_at = retry_at


class Unauthorized(ForgeError):
    code: ClassVar[str] = "forge_unauthorized"


class Forbidden(ForgeError):
    code: ClassVar[str] = "forge_forbidden"


class Suspended(Forbidden):
    code: ClassVar[str] = "forge_suspended"


class NotFound(ForgeError):
    code: ClassVar[str] = "forge_not_found"


class NotInstalled(NotFound):
    code: ClassVar[str] = "forge_not_installed"


class Conflict(ForgeError):
    code: ClassVar[str] = "forge_conflict"


class Unprocessable(ForgeError):
    code: ClassVar[str] = "forge_unprocessable"


class RateLimited(ForgeError):
    """Calls for these credentials must stop until ``retry_at`` (Unix seconds).

    ``creating``: only those that create something (a secondary limit told to one of them).
    """

    code: ClassVar[str] = "forge_rate_limited"
    retry_at: float

    def __init__(
        self,
        message: str,
        *,
        retry_at: float,
        status: int | None = None,
        request_id: str | None = None,
        creating: bool = False,
    ) -> None:
        super().__init__(message, status=status, request_id=request_id, retryable=True, retry_at=retry_at)
        self.creating = creating


class Unavailable(ForgeError):
    """No usable answer. A call that changes something may have happened all the same: look first."""

    code: ClassVar[str] = "forge_unavailable"


class AnswerInvalid(ForgeError):
    code: ClassVar[str] = "forge_answer_invalid"


class JitConfigInvalid(Exception):
    """A just-in-time configuration that is not the three files a runner needs."""

    code: ClassVar[str] = "jit_config_invalid"
