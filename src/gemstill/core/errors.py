"""The one exception meant for people."""


class Error(Exception):
    """Something a user can mend: what is wrong, where, and how to mend it, as one line.

    The CLI prints the line and exits with status 2; Python code catches this one class.

    >>> str(Error("no text in it", where="books/", fix="name a folder of .txt files"))
    'books/: no text in it; name a folder of .txt files'
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        line = f"{where}: {what}" if str(where) else what
        super().__init__(f"{line}; {fix}" if fix else line)
