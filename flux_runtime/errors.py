"""The one exception a user is meant to read."""


class FluxError(ValueError):
    """Something the user can mend: the message names the thing and the remedy, in a sentence."""
