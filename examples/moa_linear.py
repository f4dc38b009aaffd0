"""The ten lines the README shows: a linear layer becomes a mixture of eight LoRA adapters."""

import torch

import moa_ops

linear = torch.nn.Linear(1024, 1024)
layer = moa_ops.MoALinear.from_linear(linear, num_experts=8, r=16, lora_alpha=32, top_k=2)
x = torch.randn(4, 128, 1024)
assert torch.equal(layer(x), linear(x))  # fresh adapters change nothing, bit for bit

layer(
    x
).square().mean().backward()  # gradients for the adapters and the router; the weight is frozen and shared
print("trainable:", [name for name, parameter in layer.named_parameters() if parameter.requires_grad])

routing = moa_ops.Routing.from_indices(
    torch.full((4 * 128,), 3), num_experts=8
)  # or by id: expert 3 for every token
print("by id:", layer(x, routing=routing).shape)
