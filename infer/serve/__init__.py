"""Serving: continuous batching, adapters that are loaded onto the device as needed, and an HTTP API compatible with
OpenAI's."""


class Refused(Exception):
    """Raised to refuse a request, with an HTTP status, a one-line message, and optionally the invalid parameter and an
    error code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict:
        """The error as a JSON object in OpenAI's format."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
