"""Lowering and execution of compressed graphs, one module per target."""

if __name__ != "fxcompress.backends":
    raise ImportError(
        f"these modules are the package 'fxcompress.backends', but were imported as {__name__!r}:"
        " a second copy would register every backend twice."
        " Install the project (pip install -e .) and import fxcompress.backends."
    )
