"""What of a run this process does: everything, unless `distributed` gives it a rank's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from leanseek.checkpoint.pieces import Piece, pieces_of
from leanseek.checkpoint.ranks import Ranks
from leanseek.config import ModelConfig
from leanseek.data.batch import Batch
from leanseek.model import Transformer
from leanseek.training.balance import add_counts
from leanseek.training.objective import Losses


class Slice(NamedTuple):
    """What a rank updates of a parameter: a contiguous range of its elements."""

    parameter: nn.Parameter  # the range; the optimizer reads its .grad
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0  # the range's first element in the flattened whole
    first: bool = True  # of the ranks with this range, this one adds up its norm and writes its state


class Norms(NamedTuple):
    """The size of each parameter's gradient over all its elements, wherever they are."""

    names: list[str]  # of the whole network
    squares: Tensor  # [names] float64, sums of squares

    @property
    def total(self) -> Tensor:
        """The norm of all gradients. Summed in float64 in the network's order: the layout does not decide it."""
        return self.squares.sum().sqrt()

    @property
    def largest(self) -> tuple[str, float]:
        """The parameter with the largest gradient, and its norm."""
        square, place = self.squares.max(0)
        return self.names[int(place)], float(square) ** 0.5


class Forward(Protocol):
    def __call__(self, batch: Batch, hidden: Tensor | None = None, stage: int = 0) -> Losses: ...


class Part(Ranks):
    """One process: the whole network, the whole batch. A rank's part is a subclass, and all ranks call its methods in
    the same order: what follows from them is the same on all."""

    replicas = 1  # ranks, or groups of them, with sequences of their own

    # ---- what it holds ----

    def model(self, config: ModelConfig) -> Transformer:
        """The part's stages and experts, uninitialised."""
        return Transformer(config)

    def attach(self, model: Transformer, device: torch.device) -> None:
        """Called once the modules are those that train (FP8 replaces some): the model moves to the device, and
        exchanges and shards come in here."""
        model.to(device)

    def names(self, model: Transformer) -> list[str]:
        """The parameters of the whole network."""
        return [name for name, _ in model.named_parameters()]

    def slices(self, model: Transformer) -> dict[str, Slice]:
        """What this rank updates, by the parameter's name, in the network's order."""
        return {name: Slice(p, tuple(p.shape)) for name, p in model.named_parameters()}

    def pieces(self, model: Transformer) -> list[Piece]:
        """What this rank holds of the network's state dict."""
        return pieces_of(model.state_dict())

    def keeps(self, name: str) -> bool:
        """Whether this rank writes its piece of that name into checkpoints: the first of those that hold it does."""
        return True

    def stepped(self) -> None:
        """Called after the optimizer has moved the slices: the weights that others have moved come back."""

    # ---- what it does in a step ----

    def share(self, sequences: int) -> range:
        """Which of a batch's sequences are this part's."""
        return range(sequences)

    def micro_batches(self, batch: Batch, size: int) -> list[Batch]:
        """This part's rows of a step, `size` at a time (0: all)."""
        return batch.split(size)

    def accumulate(
        self, model: Transformer, batches: Sequence[Batch], forward: Forward
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Forward and backward of every micro-batch; gradients add up in `.grad`.

        Returns the losses [3] float32 (main, MTP and balance) and the tokens of each expert [E] int64 by layer: this
        part's, of the stages and sequences that it has.
        """
        sums, counts = torch.zeros(3, device=batches[0].tokens.device), dict[int, Tensor]()
        for batch in batches:
            found = forward(batch)
            found.backward()
            sums += torch.stack((found.main, found.mtp, found.balance)).detach()
            if batch.sequences:
                add_counts(counts, found.routes)
        return sums, counts

    def evaluate(self, model: Transformer, batch: Batch, forward: Forward) -> Tensor:
        """Losses [2] float32, main and MTP, of a batch without a gradient; the same on all stages."""
        found = forward(batch)
        return torch.stack((found.main, found.mtp))

    def draw(self, out: Path) -> None:
        """Draw the timeline of the last step on a pipeline's ranks into `out`, if the run has recorded one."""

    # ---- where ranks meet ----

    def reduce(self, slices: Mapping[str, Slice], sums: Tensor, counts: Tensor) -> Norms:
        """Turn the parts of a step into the whole step's, in place: the gradients of `slices`, the losses [3] float32
        and the counts [layers, E] int64. A loss or gradient that is not finite on one rank makes the norms of all ranks
        not finite, so that all clip, skip and move the biases alike."""
        return Norms(list(slices), squares([s.parameter.grad for s in slices.values()]))

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks with other sequences."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def about(self, what: str) -> Ranks:
        """The ranks as `checkpoint` sees them; `what` they exchange is said where one waits for another in vain."""
        return self

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files and speaks to its user."""
        return self.rank == 0

    # ---- what is said of it ----

    def in_words(self, threads: int) -> str:
        """How the run is laid out, for its first line; `threads`: of this process."""
        return _counted(threads, "thread")

    def begin(self, step: int) -> None:
        """Called when step `step` begins: the clock starts."""

    def seconds(self, whole: float) -> dict[str, list[float]]:
        """What each rank spent the step on that took this one `whole` seconds so far; nothing for one process."""
        return {}


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def squares(gradients: list[Tensor | None]) -> Tensor:
    """The sum of squares of each, 0 where there is none: [n] float64, in which the order of a sum hardly matters."""
    found = [g for g in gradients if g is not None]
    norms = iter(torch._foreach_norm(found)) if found else iter(())
    zero = torch.zeros((), device=found[0].device if found else None)
    return torch.stack([zero, *(zero if g is None else next(norms) for g in gradients)])[1:].double().square()
