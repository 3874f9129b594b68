"""The one exception type for faults that a user can mend."""


class UserError(Exception):
    """A fault in the user's input: recipe, files, folders, world size.

    The message says the place, what was got, what is legal and what to do. Entry points print it without a
    traceback and exit with code 2; everything else that is raised is our own fault.
    """
