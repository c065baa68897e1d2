"""The exception for mistakes of the user."""


class UserError(ValueError):
    """A mistake that one sentence, naming the value and the way out, can explain."""
