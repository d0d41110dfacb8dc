"""What the statistics of a data set recommend: sigma_data, the distance of a consistency loss, and its scale c.

The tails decide the distance: sLCT (arXiv:2502.01441, fig. 1) finds impulsive outliers in latents that pixels do not have,
and answers them with a Cauchy distance.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

from fewstep.data import LatentSpace
from fewstep.inspection import Statistics
from fewstep.objectives.scales import PER_SQRT_DIM

HEAVY_KURTOSIS: Final = 1.0
HEAVY_SHARE: Final = 1e-6  # beyond 6 std


@dataclass(frozen=True)
class Advice:
    """Recommended settings, and the reason of each in a sentence."""

    sigma_data: float
    distance: Literal["cauchy", "pseudo-huber"]
    c: str
    """a formula"""
    reasons: dict[str, str]

    @property
    def method(self) -> str:
        """The recipe with that distance, from random weights."""
        return "slct" if self.distance == "cauchy" else "ict"

    @property
    def options(self) -> dict[str, str]:
        """Setting -> the options of `fewstep train METHOD` that say it; the distance is the method's."""
        sigma = f"--sigma-data {self.sigma_data:g}"
        weighting = f"--objective.terms.denoising.weighting.sigma-data {self.sigma_data:g}"
        c = "--objective.terms.consistency.distance.c"
        if self.distance == "cauchy":
            return {"sigma_data": f"{sigma} {weighting}", "distance": "", "c": f"{c}.power 1.15 {c}.offset 0.85"}
        return {"sigma_data": sigma, "distance": "", "c": f"{c}.per-sqrt-dim {PER_SQRT_DIM}"}

    def commands(self, data: str) -> list[str]:
        """From random weights; and where pseudo-Huber will do, by way of a diffusion model. data: the --data options."""
        options = " ".join(option for option in self.options.values() if option)
        scratch = f"fewstep train {self.method} {data} {options} --out runs/{self.method}"
        if self.distance == "cauchy":
            return [scratch]
        sigma = f"--sigma-data {self.sigma_data:g} --objective.terms.denoising.weighting.sigma-data {self.sigma_data:g}"
        return [
            scratch,
            f"fewstep train edm {data} {sigma} --out runs/diffusion",
            f"fewstep train ect {data} --init runs/diffusion --out runs/ect",
        ]


def recommend(statistics: Statistics, space: LatentSpace | None = None) -> Advice:
    """What follows from the statistics of that which is trained on; space: of latents, which says what they are scaled to.

    Cauchy where a channel has both an excess kurtosis above 1 and more than 1e-6 of its values beyond 6 std (a normal:
    0 and 2e-9; Student's t with 8 degrees of freedom: 1.5 and 1.2e-4). The two limits are ours.
    """
    std, d = statistics.whole["std"], math.prod(statistics.shape)
    sigma = space.sigma_data if space else float(f"{std:.2g}")
    tails = [(row["excess_kurtosis"] or 0.0, row["beyond_std"]["6"], c) for c, row in enumerate(statistics.channels)]
    kurtosis, share, channel = max(
        tails, key=lambda tail: (tail[1] > HEAVY_SHARE and tail[0] > HEAVY_KURTOSIS, tail[0])
    )
    heavy = kurtosis > HEAVY_KURTOSIS and share > HEAVY_SHARE
    beyond = f"a share of {share:.1g}" if share else "nothing"
    measured = f"channel {channel} has excess kurtosis {kurtosis:.2g} and {beyond} beyond 6 std"
    limits = f"limits {HEAVY_KURTOSIS:g} and {HEAVY_SHARE:g}; a normal has 0 and 2e-09"
    has = f"the latents are normalised to it (measured: {std:.4g})" if space else f"the standard deviation is {std:.4g}"
    why = "which gives the network inputs and targets of variance 1 (EDM, arXiv:2206.00364, app. B.6)"
    reasons = {"sigma_data": f"{has}, {why}"}
    if heavy:
        ends = (math.exp(-1.15 * math.log(n) - 0.85) for n in (20, 640))
        reasons["distance"] = (
            f"{measured} ({limits}): impulsive outliers, which a Cauchy distance counts by their logarithm "
            "(sLCT, arXiv:2502.01441, sec. 4.1)"
        )
        reasons["c"] = (
            f"sLCT's schedule for the mean over all {d:,} values: {' to '.join(f'{c:.3g}' for c in ends)} as the grid's "
            "intervals N go from 20 to 640; fitted to Stable Diffusion's latents (arXiv:2502.01441)"
        )
        return Advice(sigma, "cauchy", "exp(-1.15 ln N - 0.85)", reasons)
    reasons["distance"] = (
        f"the heaviest tails are no impulsive outliers: {measured} ({limits}); then iCT's distance will do "
        "(arXiv:2310.14189, sec. 3.3)"
    )
    reasons["c"] = (
        f"iCT's constant for the norm over all {d:,} values: {PER_SQRT_DIM} sqrt({d}) = "
        f"{PER_SQRT_DIM * math.sqrt(d):.3g} (arXiv:2310.14189, sec. 3.3)"
    )
    return Advice(sigma, "pseudo-huber", f"{PER_SQRT_DIM} sqrt(d)", reasons)
