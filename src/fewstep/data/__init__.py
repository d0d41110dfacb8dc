"""Images to train on and to compare with: sources, the one decode policy, and an order that can resume.

    spec -> open_images -> Images -> split("train") -> batches(images, BatchOrder(n, seed), start, batch_size)

Pixels are uint8 [n, c, h, w] until `to_float`. The position in the data is one number, the images seen so far:
nothing has to be saved to resume exactly, and the batches do not depend on how many processes share them.

Latents are images too: `preparation` makes of either what a network is trained on, `originals` finds the images they are of.
"""

from fewstep.data.decode import to_float, to_uint8
from fewstep.data.images import DataSpec, Images, open_images, originals
from fewstep.data.latent_space import LatentSpace
from fewstep.data.order import BatchOrder, batches
from fewstep.data.prepare import Prepare, preparation

__all__ = [
    "BatchOrder",
    "DataSpec",
    "Images",
    "LatentSpace",
    "Prepare",
    "batches",
    "open_images",
    "originals",
    "preparation",
    "to_float",
    "to_uint8",
]
