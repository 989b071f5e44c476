"""What studies of images train, as data: sizes, the variants that text does not have, and settings."""

from gated_attention.registry.architectures import Architecture
from gated_attention.registry.settings import Settings
from gated_attention.registry.variants import BASELINE, VARIANTS, Variant
from gated_attention.sizes import ModelSize

VIT = Architecture("vit", "vit", "ViT", ffn_matrices=2, fills_hidden=True, shares_keys=False, rope_fraction=None,
                   packs_documents=False)  # fmt: skip
"""The architecture of all of them: transformers' own."""

VISION_SIZES: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("vit-tiny", 4, 64, 4, 4, 16, 256, 10, 64, ffn_matrices=2, ffn_multiple=1),
        ModelSize("vit-s", 12, 192, 3, 3, 64, 768, 10, 64, ffn_matrices=2, ffn_multiple=1),
    )
}
"""Vision transformers. The context is the number of patches, a square; the vocabulary that of labels."""

VISION_SETTINGS: dict[str, Settings] = {
    "vit-tiny": Settings(400, 64, 2e-3, warmup=0.05),
    "vit-s": Settings(10_000, 512, 1e-3, warmup=0.05),
}
"""By size; `vit-s` sees the 50,000 images of CIFAR-10 a hundred times."""

_REGISTERS = 4

VISION_VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("registers-4", registers=_REGISTERS),
        Variant("registers-4-sdpa-headwise", VARIANTS["sdpa-headwise"].block, registers=_REGISTERS),
        Variant("registers-4-sdpa-elementwise", VARIANTS["sdpa-elementwise"].block, registers=_REGISTERS),
    )
}
"""Variants with registers; those of the registry that are gates and nothing else are trained, too."""

VISION_DEFAULT = (BASELINE, "registers-4", "sdpa-headwise", "sdpa-elementwise", "registers-4-sdpa-elementwise")
"""The variants of a study of images that names none."""
