"""GPU kernels in Triton, and in Gluon for SM90. They are imported at first use, because importing triton takes a second
and reads its settings.

numbers.py  a tile's scale, rounding         quantize.py     1×128 tiles and their transposes, weight blocks
gemm.py     block-scaled products            swiglu.py       SwiGLU with quantisation, forward and backward
attention.py  around cuDNN's attention       paths.py        picks Triton, Gluon, cuBLASLt or DeepGEMM; counts which ran
hopper.py   the same for SM90, in Gluon      elementwise.py  norms, SwiGLU, a token's experts, the head's softmax, AdamW
                                             training.py     registers the ops of a training step
invariant.py  row-invariant products, experts and attention      serving.py   registers the ops of a serving step
"""

from leanseek.gpu import serving, training  # noqa: F401  (they register themselves)
