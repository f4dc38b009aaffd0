"""A mixture of LoRAs inside a transformers model: a small helper on top of ``moa_ops.MoALinear``.

Covers what the demo needs of the model level, under the names the full model API will have: sequence-level
routing with one router per block, shared by all adapted linears of that block. The base is never copied.

    config = MoAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
    model = get_moa_model(base_model, config)
    model.load_adapter("adapters/python", adapter_name="python")
    model.set_trainable(experts=False, router=True)
    out = model(input_ids, labels=input_ids, domain_ids=ids, routing_mode="teacher_forced")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moa_ops

BASE = "__base__"


@dataclass(frozen=True)
class MoAConfig:
    """Rank and scaling of the adapters, the linears they go into, and how their router decides."""

    r: int = 16
    lora_alpha: float = 32
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    top_k: int = 1
    score_func: str = "softmax"
    norm_topk_prob: bool = False
    router_domain_loss_coef: float = 1.0


@dataclass
class _Call:
    """What one forward pass (or one generate) was asked to do, and what its routers said."""

    mode: str
    ids: Tensor | None = None  # [B] expert of each row, for "teacher_forced" and "by_id"
    routing_mask: Tensor | None = None  # [B, S] the tokens a router may read; all if None
    train_gates: bool = True  # whether the output's loss reaches the routers
    decisions: dict[int, moa_ops.Routing] = field(default_factory=dict)  # block -> one row per sequence
    repeated: dict[int, moa_ops.Routing] = field(default_factory=dict)  # block -> one row per token
    logits: dict[int, Tensor] = field(default_factory=dict)  # block -> [B, E]


class MoAModel(nn.Module):
    """A causal language model whose chosen linears are mixtures of named LoRA adapters.

    ``adapters`` lists the names in expert order. ``routers`` holds one ``nn.Linear(hidden, E)`` per block. It
    reads the block's input, averaged over the tokens ``routing_mask`` allows and scaled to unit mean square;
    its decision holds for the whole row.
    """

    def __init__(self, base_model: nn.Module, config: MoAConfig):
        super().__init__()
        self.base_model = base_model.requires_grad_(False)
        self.config = config
        self.adapters: list[str] = []
        self._call = _Call("off")
        self._active: str | None = None
        self._linears: dict[str, nn.Linear] = {}
        self._block_of: dict[str, int] = {}
        blocks = base_model.model.layers
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before_block(index), with_kwargs=True)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.target_modules:
                    path = f"model.layers.{index}.{name}"
                    self._linears[path], self._block_of[path] = module, index
        if not self._linears:
            found = sorted(
                {n.rpartition(".")[2] for n, m in blocks.named_modules() if isinstance(m, nn.Linear)}
            )
            raise ValueError(
                f"no linear is called any of {list(config.target_modules)}; the blocks have {found}"
            )
        self.hidden_size = base_model.config.hidden_size
        self.routers = nn.ModuleList(nn.Identity() for _ in blocks)

    # Adapters.

    def add_adapter(self, adapter_name: str) -> None:
        """A fresh adapter (B = 0: it changes nothing yet), as the last expert."""
        if adapter_name in self.adapters:
            raise ValueError(f"an adapter called {adapter_name!r} is already there; delete it first")
        kept = list(range(len(self.adapters)))
        self._rebuild([*self.adapters, adapter_name], [*kept, None])

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an expert; the others keep their weights and move up."""
        gone = self._index(adapter_name)
        kept = [e for e in range(len(self.adapters)) if e != gone]
        self._rebuild([self.adapters[e] for e in kept], kept)

    def load_adapter(self, folder: str | Path, adapter_name: str) -> None:
        """Adds an adapter ``save_adapter`` wrote. Raises ValueError if its rank or its linears differ."""
        state = load_file(Path(folder) / "adapter_model.safetensors")
        wanted = {_key(path, half) for path in self._linears for half in "AB"}
        if set(state) != wanted:
            raise ValueError(
                f"{folder} holds other linears than this model adapts: {sorted(set(state) ^ wanted)[:4]}"
            )
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        if (settings["r"], settings["lora_alpha"]) != (self.config.r, self.config.lora_alpha):
            raise ValueError(
                f"{folder} has r={settings['r']}, lora_alpha={settings['lora_alpha']}; this model has "
                f"r={self.config.r}, lora_alpha={self.config.lora_alpha}"
            )
        self.add_adapter(adapter_name)
        with torch.no_grad():
            for path, layer in self.adapted_layers():
                layer.lora_A[-1].copy_(state[_key(path, "A")])
                layer.lora_B[-1].copy_(state[_key(path, "B")])

    def save_adapter(self, folder: str | Path, adapter_name: str) -> None:
        """Writes one adapter: ``adapter_model.safetensors``, ``adapter_config.json``, in PEFT's layout."""
        expert = self._index(adapter_name)
        state = {}
        for path, layer in self.adapted_layers():
            state[_key(path, "A")] = layer.lora_A[expert].detach().clone()
            state[_key(path, "B")] = layer.lora_B[expert].detach().clone()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.config.r,
            "bias": "none",
            "lora_alpha": self.config.lora_alpha,
            "target_modules": list(self.config.target_modules),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def copy_from(self, other: MoAModel) -> None:
        """Takes over the adapters and routers of another mixture over the same base, as copies."""
        self._rebuild(list(other.adapters), [None] * len(other.adapters))
        with torch.no_grad():
            for (_, mine), (_, theirs) in zip(self.adapted_layers(), other.adapted_layers(), strict=True):
                mine.lora_A.copy_(theirs.lora_A)
                mine.lora_B.copy_(theirs.lora_B)
        self.routers.load_state_dict(other.routers.state_dict())

    def set_adapter(self, adapter_name: str | None) -> None:
        """Every token uses, and trains, this adapter alone; None: the routers decide again."""
        if adapter_name is not None:
            self._index(adapter_name)
        self._active = adapter_name

    def set_trainable(self, *, experts: bool, router: bool) -> None:
        """Which parts take gradients; the base never does."""
        for _, layer in self.adapted_layers():
            layer.lora_A.requires_grad_(experts)
            layer.lora_B.requires_grad_(experts)
        self.routers.requires_grad_(router)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those that take gradients now."""
        return [p for p in self.parameters() if p.requires_grad]

    def adapter_tensors(self, adapter_name: str) -> list[Tensor]:
        """Views of one adapter's A and B in every layer."""
        expert = self._index(adapter_name)
        return [half[expert] for _, layer in self.adapted_layers() for half in (layer.lora_A, layer.lora_B)]

    # Running.

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        domain_ids: Tensor | None = None,
        routing_mode: str | None = None,
        adapter_names: Sequence[str] | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's output, with ``moa_losses`` and ``router_logits`` (a list of [B, E]) added.

        routing_mode: "routed" (the default), or "teacher_forced": row b uses expert ``domain_ids[b]``,
            weighted with the routers' own probability of it.
        adapter_names: one per row ("__base__": none); the routers are not asked then.
        domain_ids: [B]. The loss is LM + coef · the routers' mean cross-entropy with them; without labels it
            is the second term alone, whose gradient does not go back through the model.
        routing_mask: [B, S] bool, the tokens a router may read; all by default.
        """
        mode = routing_mode or "routed"
        ids = domain_ids
        names = [self._active] * len(input_ids) if adapter_names is None and self._active else adapter_names
        if names is not None:
            mode, ids = "by_id", self._ids(names, input_ids)
        elif mode not in ("routed", "teacher_forced"):
            raise ValueError(f"routing_mode must be 'routed' or 'teacher_forced', got {mode!r}")
        elif mode == "teacher_forced" and ids is None:
            raise ValueError("routing_mode='teacher_forced' needs domain_ids, the expert of each row")
        with self._session(_Call(mode, ids, routing_mask, train_gates=labels is not None)) as call:
            out = self.base_model(input_ids=input_ids, labels=labels, **kwargs)
        out.router_logits = [call.logits[b] for b in sorted(call.logits)]
        out.moa_losses = {} if labels is None else {"lm": out.loss}
        if domain_ids is not None and out.router_logits:
            domain = torch.stack([F.cross_entropy(z, domain_ids) for z in out.router_logits]).mean()
            out.moa_losses["router"] = self.config.router_domain_loss_coef * domain
        if out.moa_losses:
            out.loss = sum(out.moa_losses.values())
        return out

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, *, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The base model's generate; the routers decide once, on the prompt, for all new tokens."""
        call = _Call("routed")
        if adapter_names is not None:
            call = _Call("by_id", self._ids(adapter_names, input_ids))
        with self._session(call):
            return self.base_model.generate(input_ids, **kwargs)

    # Inside.

    def _before_block(self, index: int):
        """A hook that decides, before a block runs, which expert each of its rows goes to."""

        def hook(_block: nn.Module, args: tuple, kwargs: dict) -> None:
            call = self._call
            if call.mode == "off":
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            key = 0 if call.mode == "by_id" else index  # by id, all blocks share one decision
            if key not in call.decisions:
                call.decisions[key] = self._decide(call, index, hidden)
            if key not in call.repeated or call.repeated[key].num_tokens != hidden.shape[:2].numel():
                call.repeated[key] = call.decisions[key].repeat(hidden.shape[1])

        return hook

    def _decide(self, call: _Call, index: int, hidden: Tensor) -> moa_ops.Routing:
        if call.mode == "by_id":
            return moa_ops.Routing.from_indices(call.ids, num_experts=len(self.adapters))
        if call.routing_mask is None:
            pooled = hidden.mean(1)
        else:
            mask = call.routing_mask.to(hidden.dtype)
            pooled = torch.einsum("bsd,bs->bd", hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1)
        logits = self.routers[index](F.rms_norm(pooled.float(), pooled.shape[-1:]))
        call.logits[index] = logits
        if call.mode == "teacher_forced":
            weights = logits.softmax(-1).gather(1, call.ids[:, None]).squeeze(1)
            weights = weights if call.train_gates else weights.detach()
            return moa_ops.Routing.from_indices(call.ids, weights, num_experts=len(self.adapters))
        top_k = min(self.config.top_k, len(self.adapters))
        return moa_ops.topk_routing(
            logits, top_k, score_func=self.config.score_func, norm_topk_prob=self.config.norm_topk_prob
        )

    def _before_linear(self, index: int):
        """A hook that hands the block's decision to one of its linears."""

        def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            key = 0 if self._call.mode == "by_id" else index
            return args, {**kwargs, "routing": self._call.repeated[key]}

        return hook

    @contextmanager
    def _session(self, call: _Call) -> Iterator[_Call]:
        if not self.adapters:
            raise RuntimeError("this model has no adapter yet; call add_adapter or load_adapter")
        self._call = call
        try:
            yield call
        finally:
            self._call = _Call("off")

    def _rebuild(self, names: list[str], sources: list[int | None]) -> None:
        """Sets the adapters; expert e keeps the tensors of old expert ``sources[e]``, or is fresh if None."""
        kept = [(new, old) for new, old in enumerate(sources) if old is not None]
        with torch.no_grad():
            for path, linear in self._linears.items():
                old_layer = self.base_model.get_submodule(path)
                layer = linear
                if names:
                    layer = moa_ops.MoALinear.from_linear(
                        linear,
                        num_experts=len(names),
                        r=self.config.r,
                        lora_alpha=self.config.lora_alpha,
                        top_k=1,
                        norm_topk_prob=False,
                    )
                    layer.router = None  # the block decides
                    for new, old in kept:
                        layer.lora_A[new] = old_layer.lora_A[old]
                        layer.lora_B[new] = old_layer.lora_B[old]
                    layer.register_forward_pre_hook(
                        self._before_linear(self._block_of[path]), with_kwargs=True
                    )
                self.base_model.set_submodule(path, layer)
            for index, router in enumerate(self.routers):
                self.routers[index] = nn.Linear(self.hidden_size, len(names), bias=False)
                self.routers[index].weight.zero_()
                for new, old in kept:
                    self.routers[index].weight[new] = router.weight[old]
        self.adapters = names

    def adapted_layers(self) -> Iterator[tuple[str, moa_ops.MoALinear]]:
        """Path and layer of every linear that holds adapters."""
        for path in self._linears:
            layer = self.base_model.get_submodule(path)
            if isinstance(layer, moa_ops.MoALinear):
                yield path, layer

    def _index(self, name: str) -> int:
        if name not in self.adapters:
            raise ValueError(f"no adapter is called {name!r}; there are {self.adapters}")
        return self.adapters.index(name)

    def _ids(self, names: Sequence[str], input_ids: Tensor) -> Tensor:
        if len(names) != len(input_ids):
            raise ValueError(
                f"adapter_names must name one adapter per row: {len(names)} for {len(input_ids)} rows"
            )
        ids = [-1 if name == BASE else self._index(name) for name in names]
        return torch.tensor(ids, device=input_ids.device)


def get_moa_model(base_model: nn.Module, config: MoAConfig) -> MoAModel:
    """Wraps a Llama-style model (``model.layers``) in place: its chosen linears take adapters from now on."""
    return MoAModel(base_model, config)


def _key(path: str, half: str) -> str:
    return f"base_model.model.{path}.lora_{half}.weight"
