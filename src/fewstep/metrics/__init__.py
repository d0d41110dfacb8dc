"""Numbers for sets of images: features in, records out. Nothing here knows a sampler or a network that generates."""

from fewstep.metrics.extractor import Extractor as Extractor
from fewstep.metrics.features import load_extractor as load_extractor
from fewstep.metrics.frechet import FrechetReference as FrechetReference
from fewstep.metrics.frechet import frechet_distance as frechet_distance
from fewstep.metrics.kernel import kernel_distance as kernel_distance
from fewstep.metrics.precision_recall import prdc as prdc
from fewstep.metrics.record import Record as Record
from fewstep.metrics.record import better as better
from fewstep.metrics.record import rank as rank
from fewstep.metrics.reference import Reference as Reference
from fewstep.metrics.reference import measure as measure
from fewstep.metrics.statistics import Moments as Moments
