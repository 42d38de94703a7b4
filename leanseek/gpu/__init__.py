"""Kernels for GPUs in Triton, and for SM90 in Gluon. Imported where they are used: triton reads its settings, and takes
a second, then.

numbers.py  a tile's scale, rounding         quantize.py     1×128 tiles and their transposes, weight blocks
gemm.py     block-scaled products            swiglu.py       SwiGLU with quantisation, forward and backward
attention.py  around cuDNN's attention       paths.py        Triton, ours for SM90, cuBLASLt or DeepGEMM; which one ran
hopper.py   the same for SM90, in Gluon      elementwise.py  norms, SwiGLU, a token's experts, the head's softmax, AdamW
                                             training.py     what a training step asks for, as ops
invariant.py  row-invariant products, experts and attention      serving.py   what a served step asks for, as ops
"""

from leanseek.gpu import serving, training  # noqa: F401  (they register themselves)
