"""One door for foreign files, by what they are."""

from pathlib import Path

from fewstep.hub.foreign import Foreign, Kind
from fewstep.hub.weights import ARCHIVES
from fewstep.types import FewstepError


def read(
    path: Path,
    strict: bool = True,
    kind: Kind | None = None,
    resolution: int | None = None,
) -> Foreign | None:
    """The model in a pickle of EDM, ECT, TCM or EDM2, a diffusers folder, OpenAI's .pt or FastGen's .pth.

    None for weights that do not say what network they are of. kind: where the file does not tell it, or to overrule it;
    resolution: of archives that do not tell it. FewstepError for what is dangerous, damaged, of an unknown family, or
    (strict) does not fit to the last key.
    """
    if resolution and path.suffix not in ARCHIVES:
        raise FewstepError(f"{path} tells its resolution: leave out --resolution")
    try:
        return by_kind(path, strict, kind, resolution)
    except FewstepError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise FewstepError(f"{path} is damaged, or no model as it is published ({said}): fetch it again") from error


def by_kind(path: Path, strict: bool, kind: Kind | None, resolution: int | None) -> Foreign | None:
    """The reader that a file's or folder's kind asks for."""
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
