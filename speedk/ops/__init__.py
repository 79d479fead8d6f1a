"""The operations of SPEED, usable on their own: `from speedk.ops import mhsc, sparsify, ...`."""

from speedk.ops.add_layer_norm import add_layer_norm
from speedk.ops.coo import coo_decode, coo_encode, index_dtype, mhsc_coo
from speedk.ops.dispatch import explain, use_backend
from speedk.ops.freenet import BlockWeights, FReeNetWeights, freenet, freenet_block, freenet_coo
from speedk.ops.mhsc import mhsc
from speedk.ops.norm_act_pool import norm_act_pool
from speedk.ops.patches import patchify, tokens_to_images, unpatchify
from speedk.ops.topk import sparsify, topk_mask
from speedk.ops.unroll_step import unroll_step, unroll_step_adjoint

__all__ = [
    "BlockWeights",
    "FReeNetWeights",
    "add_layer_norm",
    "coo_decode",
    "coo_encode",
    "explain",
    "freenet",
    "freenet_block",
    "freenet_coo",
    "index_dtype",
    "mhsc",
    "mhsc_coo",
    "norm_act_pool",
    "patchify",
    "sparsify",
    "tokens_to_images",
    "topk_mask",
    "unpatchify",
    "unroll_step",
    "unroll_step_adjoint",
    "use_backend",
]
