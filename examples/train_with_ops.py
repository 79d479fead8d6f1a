"""A training loop of one's own that uses three ops of speedk alone: mhsc, sparsify and add_layer_norm.

It compresses smooth random fields with a shared dictionary of tokens: each signal is a sparse combination of K tokens,
heads apart, followed by a LayerNorm. Run it anywhere: python examples/train_with_ops.py
"""

from __future__ import annotations

import torch

from speedk.ops import add_layer_norm, explain, mhsc, sparsify

N, H, J, K, D = 64, 2, 16, 32, 48  # signals, heads, positions, tokens, dimension
KEPT = 64  # codes kept per signal and head, of J K = 512
STEPS = 200


def fields(generator: torch.Generator) -> torch.Tensor:
    """N smooth signals [N, J, D] of zero mean and unit variance along D."""
    walk = torch.randn(N, J, D, generator=generator).cumsum(-1)
    return (walk - walk.mean(-1, keepdim=True)) / walk.std(-1, keepdim=True)


def main() -> float:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = fields(generator).to(device)
    codes = (0.2 * torch.randn(N, H, J, K, generator=generator)).to(device).requires_grad_()
    tokens = (0.2 * torch.randn(K, D, generator=generator)).to(device).requires_grad_()
    weight = torch.ones(D, device=device, requires_grad=True)
    bias = torch.zeros(D, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([codes, tokens, weight, bias], lr=0.02)
    for name, arguments in {"mhsc": (codes, tokens), "sparsify": (codes, KEPT)}.items():
        chosen = next(backend for backend, said in explain(name, *arguments).items() if said == "chosen")
        print(f"{name} runs on {chosen}")
    for step in range(STEPS + 1):
        kept = sparsify(codes, KEPT)  # exactly KEPT per signal and head; gradients reach those alone
        decoded = add_layer_norm(mhsc(kept, tokens), None, weight, bias)
        loss = (decoded - target).square().mean()
        if step % 50 == 0:
            print(f"step {step:>4}: mean squared error {loss.item():.4f}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


if __name__ == "__main__":
    main()
