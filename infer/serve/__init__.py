"""Serving: adapters on the device, a running batch, and OpenAI's HTTP interface in front of it."""


class Refused(Exception):
    """A refused request: an HTTP status, a one-line message, and optionally the parameter at fault and an error
    code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict:
        """OpenAI's error object."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
