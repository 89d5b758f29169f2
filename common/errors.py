"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, and the fix. Command lines print it and exit with code 2."""

    def __init__(self, what: str, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(" · ".join(part for part in (where, what, fix) if part))
