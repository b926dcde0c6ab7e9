"""Which kernel computes each site of a compressed model, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.errors import BackendError

if TYPE_CHECKING:
    from fxcompress.model import CompressedModel

__all__ = ["Explanation", "SiteKernel", "explain"]


@dataclass(frozen=True)
class SiteKernel:
    """The kernel of one site.

    Args:
        site: The weight's name.
        kernel: What computes it.
        why: Why this kernel: what else was asked and refused, or why there is none.
        title: Name of the generated kernel, unique per source; empty when nothing was generated.
        source: Its source: C++ on a CPU, Triton on a CUDA device; empty when nothing was generated.
    """

    site: str
    kernel: str
    why: str
    title: str = ""
    source: str = ""


@dataclass(frozen=True)
class Explanation:
    """The kernels of a model's sites; printed, it is a table.

    Args:
        sites: In the order of their names.
    """

    sites: tuple[SiteKernel, ...]

    def __str__(self) -> str:
        width = max((len(site.site) for site in self.sites), default=0)
        return "\n".join(
            f"{site.site:{width}}  {site.kernel}\n{'':{width}}    {site.why}" for site in self.sites
        )

    def dump(self, folder: str | Path) -> list[Path]:
        """Write every distinct generated source into ``folder``, which may exist.

        Returns:
            The files.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        sources = {site.title: site.source for site in self.sites if site.source}
        written = []
        for title, source in sources.items():
            path = target / f"{title}{'.py' if 'import triton' in source else '.cpp'}"
            path.write_text(source, encoding="utf-8")
            written.append(path)
        return written


def explain(model: CompressedModel) -> Explanation:
    """The kernel of every linear site compiled so far, and why it was chosen.

    Args:
        model: A compressed model that has been called, so that its graphs are compiled.

    Raises:
        BackendError: nothing was compiled yet.

    Example:
        >>> print(fxcompress.explain(small))  # doctest: +SKIP
        >>> fxcompress.explain(small).dump("kernels")  # doctest: +SKIP
    """
    sites = tuple(model.explain_sites())
    if not sites:
        raise BackendError(
            "no site of the model is compiled yet.", fix="call the model once, then explain it."
        )
    return Explanation(sites)
