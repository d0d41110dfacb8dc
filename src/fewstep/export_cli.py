"""fewstep export: models for other programs."""

from pathlib import Path
from typing import Any, Literal

import tyro


def export(
    model: tyro.conf.Positional[str], out: tyro.conf.Positional[Path], *, to: Literal["diffusers", "onnx"] = "diffusers",
    records: tuple[Path, ...] = (), licence: str = "", title: str = "", push_to_hub: str = "", private: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a model so that diffusers or an ONNX runtime gives exactly our samples, with a model card.

    The default networks become a stock ConsistencyModelPipeline (from_pretrained, no remote code), whose second step is at
    the model's second sigma; what stock diffusers cannot hold uses `fewstep.component`, and the answer says why.

    Args:
        model: A run directory (its best weights; RUN:ema-0.999 or RUN:online by name), a search's folder or a snapshot.
        out: The folder (diffusers) or the .onnx file.
        to: diffusers: a pipeline's folder; onnx: the one-step generator, compared with PyTorch before it is kept.
        records: Files of what `fewstep evaluate` printed for these weights, for the card.
        licence: Of the weights, for the card, e.g. apache-2.0; descendants of EDM's weights are CC BY-NC-SA 4.0.
        title: Heading of the card; default: the folder's name.
        push_to_hub: OWNER/NAME on the Hugging Face hub to upload the folder to.
        private: A repository made by --push-to-hub is private (--no-private: public).
        overwrite: Replace an earlier export in OUT.
    """
    from fewstep.exporting import export as carry_out

    return carry_out(
        model, out, to, records=records, licence=licence, title=title, push_to_hub=push_to_hub, private=private,
        overwrite=overwrite,
    )  # fmt: skip
