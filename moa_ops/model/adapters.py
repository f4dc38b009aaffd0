"""``AdaptedModel``: a model with adapters in its linears: which there are, and which are trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa_ops.model.adapter import BASE_NAME, LoraAdapter, LoraFactors, check_adapter_name
from moa_ops.model.config import MoAConfig
from moa_ops.model.deciding import RouterSet, block_hook, key_of
from moa_ops.model.layer import AdaptedLinear, is_sharded
from moa_ops.model.routers import PrototypeRouter
from moa_ops.model.targets import Target, block_width, by_pattern, find_linears, replace_module, select

UNTRAINABLE = (
    "top_k=1 with norm_topk_prob=True makes every gate weight exactly 1, so the output teaches the router "
    "nothing; pass norm_topk_prob=False, or domain_ids with router_domain_loss_coef > 0"
)


class AdaptedModel(nn.Module):
    """The storage and the life of adapters and routers; :class:`~moa_ops.model.MoAModel` runs them."""

    def __init__(self, base_model: nn.Module, config: MoAConfig) -> None:
        super().__init__()
        if any(isinstance(module, AdaptedLinear) for module in base_model.modules()):
            raise ValueError("base_model already holds a mixture of LoRAs; call unload() on it first")
        self.moa_config = config
        self.adapters: list[str] = []
        self.active_adapter: str | None = None
        self._linears = find_linears(base_model)
        chosen = select(base_model, self._linears, config.target_modules, config.exclude_modules)
        self._frozen = [p for p in base_model.parameters() if p.requires_grad]
        self.base_model = base_model.requires_grad_(False)
        self.routers = RouterSet(config)
        self.layers: dict[str, AdaptedLinear] = {}
        self._hooks: dict[str, Any] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        for target in chosen:
            self._inject(target)
        for number in range(config.num_experts):
            self.add_adapter(f"expert_{number}")

    # ----------------------------------------------------------------------------------------------- adapters

    def expert_id(self, adapter_name: str) -> int:
        """The id of an adapter. Raises ``ValueError`` with the names there are."""
        if adapter_name not in self.adapters:
            raise ValueError(f"no adapter is called {adapter_name!r}; there are {self.adapters}")
        return self.adapters.index(adapter_name)

    def ids_of(self, adapter_names: Sequence[str]) -> Tensor:
        """``[B]`` ids of one adapter per row, -1 for "__base__"."""
        if isinstance(adapter_names, str):
            raise TypeError("adapter_names is a list with one name per row of the batch, got a string")
        ids = [-1 if name == BASE_NAME else self.expert_id(name) for name in adapter_names]
        return torch.tensor(ids, dtype=torch.int64)

    def add_adapter(
        self,
        adapter_name: str,
        *,
        r: int | None = None,
        lora_alpha: float | None = None,
        use_rslora: bool | None = None,
        target_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> None:
        """A fresh adapter, as the last expert: A uniform within ±1/√in, B zero: it changes nothing yet.

        What is not given is taken from the model's config. Raises ``ValueError`` for a name that is taken or
        cannot be one, and where ``target_modules`` chooses nothing.
        """
        config = self.moa_config
        targets = select(
            self.base_model,
            self._linears,
            target_modules if target_modules is not None else config.target_modules,
            exclude_modules if exclude_modules is not None else config.exclude_modules,
        )
        ranks = rank_pattern if rank_pattern is not None else config.rank_pattern
        alphas = alpha_pattern if alpha_pattern is not None else config.alpha_pattern
        r = r if r is not None else config.r
        lora_alpha = lora_alpha if lora_alpha is not None else config.lora_alpha
        use_rslora = use_rslora if use_rslora is not None else config.use_rslora
        modules = {}
        for t in targets:
            rank = by_pattern(ranks, t.path, r)
            if rank < 1:
                raise ValueError(f"r, the rank of an adapter, must be at least 1, got {rank} for {t.path}")
            A = torch.empty(rank, t.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B = torch.zeros(t.out_features, rank)
            modules[t.path] = LoraFactors(A, B, by_pattern(alphas, t.path, lora_alpha), use_rslora)
        self.insert_adapter(LoraAdapter(modules, config.lora_dropout), adapter_name)

    def insert_adapter(self, adapter: LoraAdapter, adapter_name: str) -> None:
        """Adds an adapter given as data, as the last expert; linears it is for are adapted if they are not.

        Raises ``ValueError``, and changes nothing, for a name that is taken or cannot be one, for paths that
        are no linears of the base model, and for shapes that are not theirs.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.adapters:
            raise ValueError(
                f"an adapter called {adapter_name!r} is already there; delete it, or choose another name"
            )
        targets = self._check_fits(adapter)
        self._adapt(targets)
        expert = len(self.adapters)
        for path, layer in self.layers.items():
            layer.insert(expert, targets.get(path))
        self.adapters.append(adapter_name)
        self._notes[adapter_name] = dict(adapter.notes)
        self._reorder([*range(expert), None])

    def replace_adapter(self, adapter: LoraAdapter, adapter_name: str) -> None:
        """Other weights, ranks and alphas for an adapter, which keeps its id, its scale and its router rows.

        Raises ``ValueError``, and changes nothing, as :meth:`insert_adapter` does.
        """
        expert, targets = self.expert_id(adapter_name), self._check_fits(adapter)
        scale = self.adapter_scale(adapter_name)
        self._adapt(targets)
        for path, layer in self.layers.items():
            layer.set(expert, targets.get(path))
        self.set_adapter_scale(adapter_name, scale)
        self._notes[adapter_name] = dict(adapter.notes)
        self.refresh_prototypes()

    def adapter_data(self, adapter_name: str) -> LoraAdapter:
        """The adapter as data, as copies; a scale set by :meth:`set_adapter_scale` is left out."""
        self._check_whole()
        expert = self.expert_id(adapter_name)
        modules = {}
        for path, layer in self.layers.items():
            layer.link()
            factors = layer.factors(expert)
            if factors is not None:
                A, B = factors.A.clone(), factors.B.clone(memory_format=torch.contiguous_format)
                modules[path] = LoraFactors(A, B, factors.lora_alpha, factors.use_rslora)
        return self._as_data(adapter_name, modules)

    def _as_data(self, adapter_name: str, modules: Mapping[str, LoraFactors]) -> LoraAdapter:
        conv = any(type(self._linears[path].module).__name__ == "Conv1D" for path in modules)
        return LoraAdapter(modules, self.moa_config.lora_dropout, conv, self._notes[adapter_name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and its router rows; the others keep theirs, bit for bit, and move up."""
        self._check_whole()
        expert = self.expert_id(adapter_name)
        if adapter_name == self.active_adapter:
            self.set_adapter(None)
        for layer in self.layers.values():
            layer.remove(expert)
        del self.adapters[expert], self._notes[adapter_name]
        self._reorder([e for e in range(len(self.adapters) + 1) if e != expert])

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Gives an adapter another name; its id stays."""
        expert = self.expert_id(adapter_name)
        check_adapter_name(new_name)
        if new_name in self.adapters:
            raise ValueError(f"an adapter called {new_name!r} is already there")
        self.adapters[expert] = new_name
        self._notes[new_name] = self._notes.pop(adapter_name)
        if self.active_adapter == adapter_name:
            self.active_adapter = new_name

    def set_adapter_scale(self, adapter_name: str, scale: float) -> None:
        """Multiplies what an adapter adds, everywhere; 1 is as it was trained, 0 switches it off."""
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        expert = self.expert_id(adapter_name)
        for layer in self.layers.values():
            layer.set_scale(expert, float(scale))

    def adapter_scale(self, adapter_name: str) -> float:
        """What :meth:`set_adapter_scale` set, 1 by default."""
        expert = self.expert_id(adapter_name)
        return next(slot.scale for layer in self.layers.values() if (slot := layer.slots[expert]).r)

    def _check_whole(self) -> None:
        if any(is_sharded(layer.lora_A) for layer in self.layers.values()):
            raise RuntimeError(
                "the parameters are sharded over processes: load, change and set adapters before that, and "
                "use save_pretrained to get them out"
            )

    def _check_fits(self, adapter: LoraAdapter) -> dict[str, LoraFactors]:
        """The adapter's factors under the names of this model's linears, shapes checked."""
        self._check_whole()
        names = {path: t.path for t in self._linears.values() for path in t.paths}
        unknown = sorted(set(adapter.modules) - set(names))
        if unknown:
            raise ValueError(
                f"the adapter is for {len(unknown)} modules that are no linears of this "
                f"{type(self.base_model).__name__}, such as {unknown[0]!r}; it was made for another model"
            )
        if not adapter.modules:
            raise ValueError("the adapter is empty: it is for no module at all")
        for path, factors in adapter.modules.items():
            target = self._linears[names[path]]
            have = tuple(factors.A.shape), tuple(factors.B.shape)
            want = (factors.r, target.in_features), (target.out_features, factors.r)
            if have != want:
                raise ValueError(
                    f"the adapter's A and B for {path} are {list(have[0])} and {list(have[1])}; that linear "
                    f"takes {list(want[0])} and {list(want[1])}"
                )
        return {names[path]: factors for path, factors in adapter.modules.items()}

    def _adapt(self, modules: Iterable[str]) -> None:
        """Makes these linears take adapters, if they do not."""
        for path in modules:
            if path not in self._linears:
                raise ValueError(f"{path!r} is no linear of this {type(self.base_model).__name__}")
            if path not in self.layers:
                self._inject(self._linears[path])

    def _inject(self, target: Target) -> None:
        """Puts an empty mixture in the place of a linear, and routers and hooks where it needs them."""
        layer = AdaptedLinear(target, self.moa_config.lora_dropout, self.moa_config.autocast_adapter_dtype)
        for expert in range(len(self.adapters)):
            layer.insert(expert, None)
        layer.train(target.module.training)
        replace_module(self.base_model, target.paths, layer)
        self.layers[target.path] = layer
        if target.block is not None and target.block not in self._hooks:
            module = self.base_model.get_submodule(target.block)
            hook = block_hook(target.block, module)
            self._hooks[target.block] = module.register_forward_pre_hook(hook, with_kwargs=True)
        site, width = self.routers.site_of(layer), layer.in_features
        if site != layer.path:
            width = block_width(self.base_model, target.block)
        self.routers.add_site(site, width, len(self.adapters), layer.lora_A.device)

    def _reorder(self, sources: list[int | None]) -> None:
        for router in self.routers.values():
            router.reorder(sources)
        self.refresh_prototypes()

    def refresh_prototypes(self) -> None:
        """Reads the prototypes of Arrow routers anew; needed only after adapters were trained."""
        for path, layer in self.layers.items():
            if key_of(path) in self.routers and isinstance(self.routers[key_of(path)], PrototypeRouter):
                self.routers[key_of(path)].read(layer)

    def unload(self) -> nn.Module:
        """Takes everything out again: the base model, with the very modules it had. Adapters are lost."""
        for hook in self._hooks.values():
            hook.remove()
        for path, layer in self.layers.items():
            target = self._linears[path]
            if layer.base_layer is None:  # conversions may have replaced the parameters
                target.module.weight, target.module.bias = layer.weight, layer.bias
            replace_module(self.base_model, target.paths, target.module)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        base = self.base_model
        self.layers, self.adapters, self._hooks = {}, [], {}
        return base

    # ----------------------------------------------------------------------------------------------- training

    def set_adapter(self, adapter_name: str | None) -> None:
        """Every token uses this adapter, and training changes it alone, others bit for bit as they were.

        ``None``: the routers decide again, and nothing is trainable until :meth:`set_trainable`. Make the
        optimiser after this call: the trainable parameters are other ones.
        """
        self._check_whole()
        expert = None if adapter_name is None else self.expert_id(adapter_name)
        self.active_adapter = adapter_name
        for layer in self.layers.values():
            layer.link()
            layer.activate(expert)
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
        self.routers.requires_grad_(False)
        self.refresh_prototypes()

    def set_trainable(self, *, experts: bool, router: bool) -> None:
        """Which parts take gradients: the adapters (all, or the one that is set) and the routers."""
        for layer in self.layers.values():
            active = [p for name, p in layer.named_parameters(recurse=False) if name.startswith("active_")]
            for parameter in active if self.active_adapter is not None else (layer.lora_A, layer.lora_B):
                parameter.requires_grad_(experts)
        for module in self.routers.values():
            module.requires_grad_(router and not isinstance(module, PrototypeRouter))
        if not router:
            return
        config = self.moa_config
        if config.router_type == "prototype":
            warnings.warn("prototype routers have nothing to train", stacklevel=2)
        elif len(self.adapters) < 2:
            warnings.warn("a router over fewer than two adapters has nothing to learn", stacklevel=2)
        elif self._renormalised_top_1() and not config.router_domain_loss_coef:
            warnings.warn(UNTRAINABLE, stacklevel=2)

    def _renormalised_top_1(self) -> bool:
        config = self.moa_config
        return config.top_k == 1 and config.norm_topk_prob and config.router_type != "static"

    @torch.no_grad()
    def set_mixing_weights(self, weights: Mapping[str, float]) -> None:
        """Fixes what static routers mix: each adapter times its weight, those not named times 0.

        Raises ``ValueError`` for other kinds of routers and for names that are no adapters.
        """
        if self.moa_config.router_type != "static":
            raise ValueError(
                f"only static routers have mixing weights, these are {self.moa_config.router_type!r}"
            )
        values = torch.zeros(len(self.adapters))
        for name, weight in weights.items():
            values[self.expert_id(name)] = weight * len(self.adapters)  # a static router takes the mean
        for router in self.routers.values():
            router.weight.copy_(values)

    def update_routing(self, **changes: Any) -> None:
        """Other settings of routing or losses from now on, by their names in ``MoAConfig``.

        Raises ``ValueError`` for one that a built model cannot change.
        """
        self.moa_config = self.moa_config.with_routing(**changes)
        self.routers.config = self.moa_config

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those that take gradients now."""
        return [p for p in self.parameters() if p.requires_grad]

    def num_parameters_by_kind(self) -> dict[str, int]:
        """Elements: "trainable", "base", "adapters", "routers", "all"; shared memory counts once."""
        adapters = sum(x.numel() for layer in self.layers.values() for x in (layer.lora_A, layer.lora_B))
        actives = sum(
            p.numel()
            for layer in self.layers.values()
            for n, p in layer.named_parameters(recurse=False)
            if n.startswith("active_")
        )
        routers = sum(p.numel() for p in self.routers.parameters())
        base = sum(p.numel() for p in self.base_model.parameters()) - adapters - actives
        trainable = sum(p.numel() for p in self.trainable_parameters())
        return {
            "trainable": trainable,
            "base": base,
            "adapters": adapters,
            "routers": routers,
            "all": base + adapters + routers,
        }

    def print_trainable_parameters(self) -> None:
        """One line, as PEFT prints it."""
        sizes = self.num_parameters_by_kind()
        share = 100 * sizes["trainable"] / max(sizes["all"], 1)
        print(
            f"trainable params: {sizes['trainable']:,} || all params: {sizes['all']:,} || "
            f"trainable%: {share:.4f}"
        )
