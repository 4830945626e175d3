"""The second derivative of a convolution, with kernels of the size that the convolution has.

PyTorch's own formula correlates whole images: it calls convolutions whose kernels are as large as
the images, for which a GPU has no fast code. R1 and path length regularization, which derive twice,
consist of little else. `install` replaces the formula by an equal one.
"""

from functools import cache

import torch
from torch import Tensor

Optional = Tensor | None


def double_backward(
    ggI: Optional, ggW: Optional, ggb: Optional, gO: Tensor, weight: Tensor, input: Tensor, *rest
) -> tuple[Optional, Optional, Optional]:
    """Derivative of `convolution_backward`, whose three results have the gradients ggI, ggW, ggb.

    `rest` is stride, padding, dilation, transposed, output_padding, groups and the mask of wanted
    results. -> gradients of gO, input and weight: what is linear in two of them is a convolution or
    a first derivative of one.
    """
    *how, wanted = rest
    ggO = gI = gW = None
    if wanted[0]:
        pairs = ((ggI, weight), (input, ggW))
        known = [(x, w) for x, w in pairs if x is not None and w is not None]
        parts = [torch.convolution(x, w, None, *how) for x, w in known]
        parts += [] if ggb is None else [ggb.reshape(-1, *[1] * (gO.dim() - 2)).expand_as(gO)]
        ggO = sum(parts) if parts else None
    first = torch.ops.aten.convolution_backward
    if wanted[1] and ggW is not None:
        gI = first(gO, input, ggW, None, *how, [True, False, False])[0]
    if wanted[2] and ggI is not None:
        gW = first(gO, ggI, weight, None, *how, [False, True, False])[1]
    return ggO, gI, gW


@cache
def install() -> torch.library.Library:
    """Replace PyTorch's formula in this process. -> what keeps it replaced."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convolution_double_backward", double_backward, "CompositeImplicitAutograd")
    return library
