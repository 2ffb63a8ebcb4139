"""Which weights are not what a layer multiplies with, but stand for it in fewer bits."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantised(weight: Tensor) -> bool:
    """Whether it is integers, fp8, one of torchao's subclasses or bitsandbytes' 4 bits.

    Those of bitsandbytes may be stored as floats (`bnb_4bit_quant_storage`), as fp8 stands for a
    weight with scales, and torchao's weights show a plain dtype.
    """
    is_number = weight.is_floating_point() and weight.dtype.itemsize >= 2
    is_subclass = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return not is_number or is_subclass or getattr(weight, "quant_state", None) is not None
