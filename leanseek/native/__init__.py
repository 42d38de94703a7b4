"""Native kernels for CPUs with AVX2 or AVX-512 (sources in kernels/). Where none is built, the torch references run."""

from leanseek.native.library import Status, status, usable_variants, use_variant

if usable_variants():
    from leanseek.native import attention, fp8, grouped, latent_attention, rowwise, sampling  # noqa: F401  (they register themselves)

__all__ = ["Status", "status", "usable_variants", "use_variant"]
