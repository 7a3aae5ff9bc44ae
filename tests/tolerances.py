"""One table of tolerances, each with its reason."""

# Published implementations: figures stored in float64 by another float64 program.
GOLDEN_FLOAT64 = 1e-9
# The published programs keep some float32 constants and sums even in their float64 runs.
GOLDEN_OFFICIAL = 5e-6
# float32 arithmetic of ours against either.
GOLDEN_FLOAT32 = 2e-5
# Gradients of published programs, as a share of the largest entry: they were stored in float32.
GOLDEN_GRADIENT = 1e-5
# Published image filters, as a share of the largest entry: they ran in float32.
GOLDEN_FILTERED = 1e-5

# float64 closed form against float64 autograd: rounding of two different orders of summation.
FLOAT64_VALUE = 1e-11
FLOAT64_GRADIENT = 1e-9
# Evidence of thousands (exp): ulp of e ln e, of which the reference takes differences.
FLOAT64_VALUE_LARGE = 1e-10
# float32 loss, relative, and gradient, as a share of its largest entry: a few ulp (2^-24) through one voxel's chain.
FLOAT32_VALUE = 1e-6
FLOAT32_GRADIENT = 2e-6
# Priors of dozens: ulp of the evidence of all classes, which cancels in the KL term.
FLOAT32_VALUE_LARGE = 5e-6
# Measures and gradients of certain voxels are differences of larger numbers: below this share of those ulp count.
SMALL_DIFFERENCE = 0.05
# Evidence of several thousand (exp), logits beyond 30, priors far from 1: ulp of concentrations, not of results.
FLOAT32_GRADIENT_LARGE = 2e-5
# Output rounded to bfloat16 (8 bits) or float16 (11 bits), as a share of the largest entry.
BFLOAT16 = 2**-8
FLOAT16 = 2**-11
# Maps in float32 and their gradients, absolute below 1 and relative above: a few ulp through digamma and its kin.
FLOAT32_MAPS = 5e-6

# Metrics that sort against float64 programs that sort: sums of up to a million float64 terms.
EXACT_METRIC = 1e-9
