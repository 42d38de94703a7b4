"""Which scales a run uses, and the weights as its products read them."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import quantize as q
from leanseek.ops.formats import TILE, Counts, counts, quantize, spread, tile_scale
from leanseek.ops.grouped import Groups
from leanseek.ops.operands import Activation, Kept, Weight
from leanseek.ops.quantize import Both, SwiGLUBackward
from leanseek.ops.swiglu import swiglu_gradient


class Tilewise:
    """The paper's: 1×128 tiles of activations and gradients, 128×128 blocks of weights.

    With power-of-two scales (V3.1's ue8m0) BF16 holds every operand exactly, and turning what was kept from 1×128 to
    128×1 tiles loses only what is too small beside its new neighbours. Else scales are float32 (amax / 448).
    """

    gradient_tile = 1, TILE  # of the gradients' `rows`

    def __init__(self, power_of_two: bool = True):
        self.power_of_two = power_of_two
        self._latest: tuple[weakref.ref[Tensor], int, tuple[Activation, Kept]] | None = None

    def shared_rows(self, x: Tensor) -> tuple[Activation, Kept]:
        """`rows` of x [..., K]. Modules that read one tensor after each other share what was made for the first."""
        found = self._latest
        if found is None or found[0]() is not x or found[1] != x._version:
            made = self.rows(x.detach().reshape(-1, x.shape[-1]))
            self._latest = found = weakref.ref(x, self._forget), x._version, made
        return found[2]

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._latest is not None and self._latest[0] is dead:
            self._latest = None

    def rows(self, x: Tensor) -> tuple[Activation, Kept]:
        return q.rows(x, self.power_of_two)

    def turn(self, x: Tensor | Kept, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> Activation:
        return q.turn(x, groups, self.power_of_two, dtype, index)

    def both(self, x: Tensor, groups: Groups) -> Both:
        return q.both(x, groups, self.power_of_two)

    def blocks(self, weight: Tensor, dtype: torch.dtype) -> Weight:
        return q.blocks(weight, self.power_of_two, dtype)

    def swiglu(self, hidden: Tensor, weight: Tensor | None) -> tuple[Activation, Kept]:
        return q.swiglu(hidden, weight, self.power_of_two)

    def whole_scale(self, x: Tensor) -> Tensor | None:
        """The one scale [1] of all of x; None where each tile has its own."""
        return None

    def swiglu_backward(self, grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups) -> SwiGLUBackward:
        return q.swiglu_backward(grad, hidden, weight, groups, self.power_of_two)


class GradientBlocks(Tilewise):
    """Activation gradients in 128×128 blocks, the rest as in the paper: its appendix B.2, which diverged.

    One cast then serves both products of backward, but tokens with small gradients share a scale with those that have
    large ones. Scales are powers of two.
    """

    gradient_tile = TILE, TILE

    def both(self, x: Tensor, groups: Groups) -> Both:
        return q.both_blocks(x, groups, x.dtype)

    def swiglu_backward(self, grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups) -> SwiGLUBackward:
        dgate, dup, act, dweight = swiglu_gradient(*q.hidden_halves(hidden), weight, grad.float())
        dhidden = q.both_blocks(torch.cat((dgate, dup), dim=-1), groups, grad.dtype, 2)
        return SwiGLUBackward(dhidden, q.turn(act, groups, True, grad.dtype), dweight)


class Tensorwise(Tilewise):
    """One scale for a whole tensor (for each expert's weight): here to show why tiles matter."""

    def rows(self, x: Tensor) -> tuple[Activation, Kept]:
        return q.rows(x, self.power_of_two, self.whole_scale(x))

    def turn(self, x: Tensor | Kept, groups: Groups, dtype: torch.dtype, index: Tensor | None = None) -> Activation:
        if isinstance(x, Kept):  # on the grid of its one scale: the same codes again
            operand, _ = q.rows(x.wide().to(dtype), self.power_of_two, x.scales.flatten()[:1])
        else:
            operand, _ = self.rows(x)
        return operand if index is None else operand.index_select(0, index)

    def both(self, x: Tensor, groups: Groups) -> Both:
        operand, _ = self.rows(x)
        return Both(operand, operand)

    def blocks(self, weight: Tensor, dtype: torch.dtype) -> Weight:
        scales = [self.whole_scale(w) for w in weight]
        return q.blocks(weight, self.power_of_two, dtype, torch.cat(scales))

    def swiglu(self, hidden: Tensor, weight: Tensor | None) -> tuple[Activation, Kept]:
        gate, up = hidden.float().chunk(2, dim=-1)
        act = F.silu(gate) * up
        scale = self.whole_scale(hidden)
        halves = [q.rows(half, self.power_of_two, scale)[1] for half in hidden.chunk(2, dim=-1)]
        kept = Kept(torch.cat([k.codes for k in halves], -1), torch.cat([k.scales for k in halves], -1))
        return self.rows((act if weight is None else act * weight[:, None]).to(hidden.dtype))[0], kept

    def swiglu_backward(self, grad: Tensor, hidden: Kept, weight: Tensor | None, groups: Groups) -> SwiGLUBackward:
        dgate, dup, act, dweight = swiglu_gradient(*q.hidden_halves(hidden), weight, grad.float())
        dhidden = self.both(torch.cat((dgate, dup), dim=-1).to(grad.dtype), groups)
        return SwiGLUBackward(dhidden, self.rows(act.to(grad.dtype))[0], dweight)

    def whole_scale(self, x: Tensor) -> Tensor:
        amax = torch.where(x.isfinite(), x, 0.0).abs().amax() if x.numel() else x.new_zeros(())
        return tile_scale(amax, self.power_of_two).view(1)


class Cast:
    """What one module needs to run in FP8: the recipe, and its weights as operands, cast once per optimizer step.

    `wide_input`: the input is kept as it is, because something else keeps it anyway (the attention its output).
    `seen`: set to {} to count what quantisation loses, by "input", "weight" and "gradient" of the latest pass.
    """

    def __init__(self, recipe: Tilewise, wide_input: bool = False):
        self.recipe, self.wide_input = recipe, wide_input
        self.seen: dict[str, Counts] | None = None
        self._casts: dict[int, tuple[object, Weight]] = {}

    def input(self, x: Tensor) -> tuple[Activation, Kept]:
        """x [..., K] in 1×128 tiles: as a product reads it, and as backward finds it."""
        self.note("input", x.detach().reshape(-1, x.shape[-1]))
        return self.recipe.shared_rows(x)

    def weight(
        self,
        place: int,
        dtype: torch.dtype,
        *parameters: Tensor,
        shape: tuple[int, int] | None = None,
        stack: int = 1,
    ) -> Weight:
        """Equal parameters [.., rows, columns] in blocks: [n, rows, columns]. Cast anew when one has changed.

        `place` tells a module's weights apart. `shape`: each matrix's shape after zero padding. `stack`: how many
        matrices are concatenated into one.
        """
        key = (dtype, *((p._version, p.data_ptr()) for p in parameters))
        found = self._casts.get(place)
        if found is None or found[0] != key:
            found_at = [p.detach() for p in parameters]
            stacked = found_at[0] if len(found_at) == 1 else torch.stack(found_at)
            rows, columns = shape or stacked.shape[-2:]
            if (rows, columns) != stacked.shape[-2:]:
                stacked = F.pad(stacked, (0, columns - stacked.shape[-1], 0, rows - stacked.shape[-2]))
            stacked = stacked.view(-1, stack * rows, columns)
            self._casts.pop(place, None)  # before the new one is made: it takes the old one's memory
            found = (key, self.recipe.blocks(stacked, dtype))
            self._casts[place] = found
            self.note("weight", stacked, (TILE, TILE))
        return found[1]

    def forget(self) -> None:
        """Cast the weights again when they are next read."""
        self._casts.clear()

    def note(self, what: str, x: Tensor, tile: tuple[int, int] = (1, TILE)) -> None:
        """Count what is lost of x, where somebody asked for it."""
        if self.seen is not None:
            _, scales = quantize(x, tile, self.recipe.power_of_two, self.recipe.whole_scale(x))
            self.seen[what] = counts(x, spread(scales, tile, x.shape))
