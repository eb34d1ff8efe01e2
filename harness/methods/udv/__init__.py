"""`udv`: a PEFT tuner that trains parts of a weight's own singular value decomposition.

    W ~= U diag(D) V^T      W (m, n), U (m, k), D (k,), V (n, k)      y = U (D * (V^T x)) + b

Legend: m outputs, n inputs, k triplets kept, T tokens in a batch. `train` says which of U, D, V
train, `residual` what becomes of W - U D0 V^T, the part that the k triplets leave out (a 0 marks
the value at the start). `residual: keep` with `train: d` is singular-value fine-tuning (SVDiff,
arXiv 2303.11305; SVF, arXiv 2206.06122; "SVFT plain", arXiv 2405.19597).

    from harness.methods.udv import UDVConfig      # registers the tuner with PEFT
    model = peft.get_peft_model(base, UDVConfig(rank=64, train="d", target_modules="all-linear"))

What a layer stores beside the base weight, which always stays, so that `disable_adapter` and
`unmerge` give back the original bits:

| residual | train | trained | frozen, in buffers | output |
| --- | --- | --- | --- | --- |
| drop | any | what `train` says | the other factors | U D V^T x + b |
| keep | d | D (k) | U, V, D0: k (m + n + 1) | base(x) + U ((D - D0) * V^T x) |
| keep | u | U (m k) | U0, D, V: k (m + n + 1) | base(x) + (U - U0) D V^T x |
| keep | v | V (n k) | U, D, V0: k (m + n + 1) | base(x) + U D (V - V0)^T x |
| keep | udv | k (m + n + 1) | U0, D0, V0: k (m + n + 1) | base(x) + U D V^T x - U0 D0 V0^T x |

No second copy of W is kept, and `keep` equals the base bit for bit at the start in every row: the
added term is exactly zero. A merged layer holds its new weight and the original one, m n elements
more, until `unmerge` puts it back or `merge_and_unload` lets it go.

`truncate`, a rank-k W with nothing trained, is `train="none"`.

Frozen U and V keep the base weight's dtype; D, whatever trains and its start values are at least
float32, as PEFT does for its own adapters (`autocast_adapter_dtype=False` casts them too). One
matrix takes `udv` or another method, not both.
"""

from harness.methods.udv.config import PEFT_TYPE, UDVConfig
from harness.methods.udv.layer import UDVEmbedding, UDVLayer, UDVLinear
from harness.methods.udv.model import UDVModel, orthogonality_penalty

__all__ = [
    "PEFT_TYPE",
    "UDVConfig",
    "UDVEmbedding",
    "UDVLayer",
    "UDVLinear",
    "UDVModel",
    "orthogonality_penalty",
]
