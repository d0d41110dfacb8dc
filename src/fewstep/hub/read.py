"""One door for foreign files, by what they are."""

from pathlib import Path
from typing import Literal

from fewstep.hub.foreign import Foreign
from fewstep.hub.weights import ARCHIVES


def read(
    path: Path,
    strict: bool = True,
    kind: Literal["diffusion", "consistency"] | None = None,
    resolution: int | None = None,
) -> Foreign | None:
    """The model in a pickle of EDM, ECT, TCM or EDM2, a diffusers folder, OpenAI's .pt or FastGen's .pth.

    None for weights that do not say what network they are of. kind: where the file does not tell it, or to overrule it;
    resolution: of archives that do not tell it. FewstepError for what is dangerous, damaged, of an unknown family, or
    (strict) does not fit to the last key.
    """
    if path.is_dir():
        from fewstep.hub.folders import read_folder

        return read_folder(path, strict, kind)
    if path.suffix == ".pkl":
        from fewstep.hub.edm import read_edm

        return read_edm(path, strict, kind)
    if path.suffix in ARCHIVES:
        from fewstep.hub.archives import read_archive

        return read_archive(path, strict, kind, resolution)
    return None
