"""Every operator once on small shapes, forward and backward: what compute-sanitizer runs under.

compute-sanitizer --tool memcheck python tests/gpu/small.py [--device cuda]
compute-sanitizer --tool initcheck python tests/gpu/small.py --alone

``--alone``: no product of the library's in 16 bits. On Hopper cards it stores by bulk copies, which initcheck
does not see: it calls whatever reads the result a reader of memory that nobody wrote, torch's additions too.
"""

from __future__ import annotations

import argparse

import torch

import moa_ops

moa = torch.ops.moa_ops


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
        layer(x, mask=mask).float().square().mean().backward()
    with torch.no_grad():
        y = layer(x)
        given = layer(x, routing=layer.route(x)[1])
    for tensor in (y, given, x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.router.weight.grad):
        assert tensor.isfinite().all()


def operators_alone(
    device: str, dtype: torch.dtype, tokens: int, sizes: tuple[int, int], experts: int, k: int
) -> None:
    """What a layer's step calls, but for the product of its base."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    x, base, grad_y = normal(tokens, sizes[0]), normal(tokens, sizes[1]), normal(tokens, sizes[1])
    lora = normal(experts, 8, sizes[0]), normal(experts, sizes[1], 8)
    router = normal(experts, sizes[0]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    flags = 0, k > 1
    y, logits, *routing, h = moa.routed_lora(x, *lora, router, k, *flags, 2.0, None)
    weights, indices, offsets, order = routing
    given, h_given = moa.segment_lora(x, *lora, weights, offsets, order, None, 2.0, None, base, None)
    grads = moa.segment_lora_backward(
        grad_y, x, *lora, *routing, h, None, 2.0, None, router, logits, *flags, True, True, True, False, True
    )
    mask = torch.arange(tokens, device=device) % 3 != 1
    masked = moa.linear_routing(x, router, k, *flags, None, mask)
    if tokens <= 16 and dtype.itemsize == 2:  # the base's product is ours, too
        adapted = normal(sizes[1], sizes[0]), None, *lora
        assert moa.routed_linear(x, *adapted, router, k, *flags, 2.0).isfinite().all()
        segments = weights, offsets, order, None, 2.0, None
        assert moa.segment_linear(x, *adapted[:2], None, *lora, *segments).isfinite().all()
    through = moa.topk_routing_backward(torch.ones_like(weights), logits, indices, *flags)
    for tensor in (y, h, given, h_given, *grads, masked[0], through):
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
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args(words)
    device, step = args.device, operators_alone if args.alone else layer_step
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        step(device, dtype, 5, (64, 48), 4, 2)
        step(device, dtype, 130, (72, 200), 9, 3)
        step(device, dtype, 3000, (72, 64), 8, 2)  # every expert for every token
    step(device, torch.bfloat16, 70, (65, 33), 130, 1)
    step(device, torch.bfloat16, 2100, (72, 64), 64, 2)  # tokens in another order
    sorting(device, 100, 8)
    sorting(device, 20_000, 70)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every operator ran")


if __name__ == "__main__":
    main()
