"""Two-dimensional convolutions of many sets of images, each with weights of its own, as operations that derivatives and graphs know.

    y_b = x_b ∗ w_b                                                  (`convolve`)
    ⟨g, x ∗ w⟩ = ⟨Gx(g, w), x⟩ = ⟨Gw(g, x), w⟩                        (`_in_images`, `_in_weights`)

All three are linear in both of their arguments and the derivative of each is made of the other two, so they go with any order of
derivative. `torch.func.vmap` turns such a convolution into a grouped one, which on CPUs takes twice the time of a loop over b, and its
derivatives more. Here a loop is taken, inside one operation. Elsewhere than on CPUs the layer stays torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW = 4  # input channels: patches of so few are copied out and multiplied, 4–10 times faster than the library's convolution
LAST = torch.channels_last


class TaskConv2d(nn.Conv2d):
    """`nn.Conv2d` whose convolution is fast under `torch.func.vmap` over its weights."""

    @classmethod
    def of(cls, layer: Any) -> TaskConv2d:
        """The same layer, with the same parameters."""
        own = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
            layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
        own.weight, own.bias = layer.weight, layer.bias
        return own.train(layer.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.padding, str) or self.groups > 1 or input.dim() < 4 or input.device.type != "cpu":
            return super()._conv_forward(input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if torch.is_autocast_enabled("cpu"):
            input, weight = (v.to(torch.get_autocast_dtype("cpu")) for v in (input, weight))
        y = convolve(input[None], weight[None], [*self.stride, *padding, *self.dilation])[0]
        return y if bias is None else y + bias[:, None, None]


@torch.library.custom_op("bayesmeta::convolve", mutates_args=())
def convolve(x: Tensor, w: Tensor, how: list[int]) -> Tensor:
    """``x (B, N, C, H, W)`` and ``w (B, O, C, h, w)`` to ``(B, N, O, H', W')``. ``how``: stride, padding and dilation, two each."""
    y = x.new_empty((*x.shape[:2], w.shape[1], *_size(x, w, how)))
    if w.stride(0) == 0:  # φ is still the same for all: one convolution of all images
        y.flatten(0, 1).copy_(_plain(x.flatten(0, 1), w[0], how))
        return y
    for b in range(len(x)):
        y[b] = _plain(x[b], w[b], how)
    return y


@torch.library.custom_op("bayesmeta::convolve_in_images", mutates_args=())
def _in_images(g: Tensor, w: Tensor, size: list[int], how: list[int]) -> Tensor:
    """``g (B, N, O, H', W')`` and ``w`` to ``(B, N, C, *size)``."""
    x = g.new_empty((*g.shape[:2], w.shape[2], *size))
    for b in range(len(g)):
        x[b] = _derivative(g[b].contiguous(memory_format=LAST), x[b], w[b].contiguous(memory_format=LAST), how, (True, False))
    return x


@torch.library.custom_op("bayesmeta::convolve_in_weights", mutates_args=())
def _in_weights(g: Tensor, x: Tensor, size: list[int], how: list[int]) -> Tensor:
    """``g (B, N, O, H', W')`` and ``x`` to ``(B, O, C, *size)``."""
    w = x.new_empty(len(g), g.shape[2], x.shape[2], *size)
    for b in range(len(g)):
        if x.shape[2] <= FEW:
            columns = _patches(x[b], size, how)
            w[b] = (g[b].movedim(1, -1).flatten(0, 2).mT @ columns.flatten(0, 2)).view(g.shape[2], *size, -1).movedim(-1, 1)
        else:
            w[b] = _derivative(g[b], x[b], w[b], how, (False, True))
    return w


def _plain(x: Tensor, w: Tensor, how: list[int]) -> Tensor:
    """One convolution, ``(N, C, H, W)`` and ``(O, C, h, w)``."""
    if x.shape[1] > FEW:
        return torch.conv2d(x, w, None, how[:2], how[2:4], how[4:])
    return (_patches(x, list(w.shape[2:]), how) @ w.movedim(1, -1).flatten(1).mT).movedim(-1, 1)


def _patches(x: Tensor, size: list[int], how: list[int]) -> Tensor:
    """The numbers under each place of the kernel, ``(N, H', W', h · w · C)``."""
    (sy, sx, py, px, dy, dx), (h, w) = how, size
    height, width = _size(x, x.new_empty(1, 1, 1, h, w, device="meta"), how)
    x = functional.pad(x.movedim(1, -1), (0, 0, px, px, py, py))
    rows, columns = (slice(i * dy, i * dy + sy * (height - 1) + 1, sy) for i in range(h)), range(w)
    return torch.cat([x[:, row, j * dx : j * dx + sx * (width - 1) + 1 : sx] for row in rows for j in columns], -1)


def _derivative(g: Tensor, x: Tensor, w: Tensor, how: list[int], which: tuple[bool, bool]) -> Tensor:
    back = torch.ops.aten.convolution_backward(g, x, w, None, how[:2], how[2:4], how[4:], False, [0, 0], 1, [*which, False])
    return back[0] if which[0] else back[1]


def _size(x: Tensor, w: Tensor, how: list[int]) -> tuple[int, int]:
    """H' and W'."""
    sizes = ((x.shape[i - 2] + 2 * how[2 + i] - how[4 + i] * (w.shape[i - 2] - 1) - 1) // how[i] + 1 for i in range(2))
    return next(sizes), next(sizes)


# --- what torch has to know of them: shapes, derivatives, and what they do under vmap


@convolve.register_fake
def _(x: Tensor, w: Tensor, how: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:2], w.shape[1], *_size(x, w, how)))


@_in_images.register_fake
def _(g: Tensor, w: Tensor, size: list[int], how: list[int]) -> Tensor:
    return g.new_empty((*g.shape[:2], w.shape[2], *size))


@_in_weights.register_fake
def _(g: Tensor, x: Tensor, size: list[int], how: list[int]) -> Tensor:
    return x.new_empty(len(g), g.shape[2], x.shape[2], *size)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.how = inputs[-1]


def _of_convolve(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (x, w), (in_x, in_w, *_) = ctx.saved_tensors, ctx.needs_input_grad
    return (
        _in_images(g, w, list(x.shape[-2:]), ctx.how) if in_x else None,
        _in_weights(g, x, list(w.shape[-2:]), ctx.how) if in_w else None,
        None,
    )


def _of_images(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    (g, w), (in_g, in_w, *_) = ctx.saved_tensors, ctx.needs_input_grad
    return convolve(v, w, ctx.how) if in_g else None, _in_weights(g, v, list(w.shape[-2:]), ctx.how) if in_w else None, None, None


def _of_weights(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
    (g, x), (in_g, in_x, *_) = ctx.saved_tensors, ctx.needs_input_grad
    return convolve(x, u, ctx.how) if in_g else None, _in_images(g, u, list(x.shape[-2:]), ctx.how) if in_x else None, None, None


def _batched(operation: Any) -> Any:
    """Under vmap: one more axis is more sets."""

    def rule(info: Any, dims: tuple[int | None, ...], one: Tensor, other: Tensor, *rest: list[int]) -> tuple[Tensor, int]:
        parts = [
            (v.expand(info.batch_size, *v.shape) if d is None else v.movedim(d, 0)).flatten(0, 1)
            for v, d in zip((one, other), dims[:2], strict=True)
        ]
        return operation(*parts, *rest).unflatten(0, (info.batch_size, -1)), 0

    return rule


for _operation, _derivative_of in ((convolve, _of_convolve), (_in_images, _of_images), (_in_weights, _of_weights)):
    _operation.register_autograd(_derivative_of, setup_context=_keep)
    _operation.register_vmap(_batched(_operation))
