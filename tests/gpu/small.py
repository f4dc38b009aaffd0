"""Every operator once on small shapes, forward and backward: what compute-sanitizer runs under.

compute-sanitizer --tool memcheck python tests/gpu/small.py [--device cuda]
"""

from __future__ import annotations

import argparse

import torch

import moa_ops


def layer_step(
    device: str, dtype: torch.dtype, tokens: int, sizes: tuple[int, int], experts: int, k: int
) -> None:
    """A training step and a forward without gradients; everything it gives is finite."""
    layer = moa_ops.MoALinear(*sizes, num_experts=experts, r=8, top_k=k, norm_topk_prob=k > 1).to(
        device, dtype
    )
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, sizes[0], device=device, dtype=dtype, requires_grad=True)
    for mask in (None, torch.arange(tokens, device=device) % 3 != 1):
        layer(x, mask=mask).float().square().sum().backward()
    with torch.no_grad():
        y = layer(x)
        given = layer(x, routing=layer.route(x)[1])
    for tensor in (y, given, x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.router.weight.grad):
        assert tensor.isfinite().all()


def sorting(device: str, slots: int, experts: int) -> None:
    """The sort on one block and on several."""
    ids = torch.randint(-1, experts, (slots,), device=device)
    routing = moa_ops.Routing.from_indices(ids, num_experts=experts)
    assert torch.equal(routing.order.long().sort().values, torch.arange(slots, device=device))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(words).device
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer_step(device, dtype, 5, (64, 48), 4, 2)
        layer_step(device, dtype, 130, (72, 200), 9, 3)
    layer_step(device, torch.bfloat16, 70, (65, 33), 130, 1)
    sorting(device, 100, 8)
    sorting(device, 20_000, 70)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every operator ran")


if __name__ == "__main__":
    main()
