"""The one exception that a user is meant to read: one sentence that ends with what to do."""


class UserError(Exception):
    """Raised for every fault that the user can mend: input, recipe, files, machine.

    The command line prints its message alone, without a traceback, and exits with status 2.
    """
