"""The one point of a step at which the ranks of a run meet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Reduction:
    """One process, which has the whole batch and every weight: its figures are the step's.

    A run on several ranks hands `Trainer` a subclass that sums them. Each rank calls it once a step, after backward.
    What follows depends on its results alone, so all ranks clip, skip and move the biases alike: a loss or gradient
    that is not finite on one rank makes the sums of all ranks not finite.
    """

    def __call__(self, gradients: Mapping[str, Tensor], losses: Tensor, counts: Tensor) -> Tensor:
        """Turn a rank's part of a step into the whole step's, in place; returns the norm of all gradients, a scalar.

        gradients: by parameter, summed over the ranks that hold the parameter, unless backward has done that already.
        losses [3] float32: main, MTP and balance; counts [layers, E] int64: both summed over the ranks with other
        tokens. The norm is the root of the sum of squares over all shards of all parameters, each counted once.
        """
        return torch.nn.utils.get_total_norm(list(gradients.values()))
