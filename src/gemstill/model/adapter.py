"""Any causal language model of `transformers` behind our call, as a student or as a teacher.

`Adapter(model)` is called like `Transformer`: model(tokens, documents=…, readout=…). Its last hidden states,
its head's weight and its final soft cap go to the readout inside forward, so that everything that works on a
`Transformer` works on it: the loss without logits, `teach`, the loop. This module does not import `transformers`.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemstill.core.errors import Error
from gemstill.model.readout import Readout, last_logits, logits
from gemstill.model.transformer import count_positions

_NO_MATTER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "gemstill_version")
_WHOLE = 1 << 40  # a window for layers that have none


@dataclass(frozen=True)
class ForeignConfig:
    """The shape of a network that is not ours: what counting, cards and comparisons ask of ModelConfig."""

    family: str  # its class in `transformers`, LlamaForCausalLM
    fields: dict[str, Any]  # what its config says, without what does not change the network
    vocab_size: int  # rows of the head
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_position: int  # tokens
    sliding_window: int
    local_layers: list[bool]  # of each layer: whether it sees `sliding_window` tokens alone
    body_parameters: int  # without embedding and head
    embedding_parameters: int  # of the embedding, and of the head where it is not tied

    def is_local(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, attends within the sliding window only."""
        return self.local_layers[layer]

    @staticmethod
    def of(model: Any) -> ForeignConfig:
        """The shape of a causal model of `transformers`, whose weights may lie on the meta device."""
        config = model.config
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
        heads = int(config.num_attention_heads)
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        matrices = head.numel() + (0 if head is embedding else embedding.numel())
        return ForeignConfig(
            family=type(model).__name__,
            fields=_plain({name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}),
            vocab_size=len(head),
            hidden_size=width,
            intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * width),
            num_layers=layers,
            num_heads=heads,
            head_dim=int(getattr(config, "head_dim", None) or width // heads),
            max_position=int(getattr(config, "max_position_embeddings", 0) or 0),
            sliding_window=int(window or _WHOLE),
            local_layers=[kind == "sliding_attention" for kind in kinds],
            body_parameters=sum(p.numel() for p in model.parameters()) - matrices,
            embedding_parameters=matrices,
        )


class Adapter(nn.Module):
    """A causal model of `transformers` that is called as gemstill's networks are.

    model: for example AutoModelForCausalLM.from_pretrained(…). It is run once on eight tokens to see that it is
    what it has to be; its weights stay where they are, under `model.` in `named_parameters`.

    compute_dtype: of products and activations, None for the weights' own. Narrower than the weights, they stay as
    they are (float32 masters) and products run under autocast. checkpointing: whether training keeps only each
    block's input.

    Raises:
        Error: the head has a bias, or logits are not the head times the last hidden states; there is no way to
            tell it positions; hidden states depend on later tokens (an encoder) or on another document; it is
            in training mode with dropout on.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        name = type(model).__name__
        _expect(model, name)
        if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")  # sdpa has no cap and would leave it out
        self.model = model
        self.config = ForeignConfig.of(model)
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.compute_dtype: torch.dtype | None = None
        self.train(model.training)
        if not self.head.is_meta:
            self._check(name)

    @property
    def head(self) -> Tensor:
        """The head's weight [V, D]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def layers(self) -> nn.ModuleList:
        """Its blocks: what is sharded, compiled and moved by Muon."""
        for module in self.model.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_layers:
                return module
        raise Error("has no list of its layers", where=self.config.family)

    @property
    def checkpointing(self) -> bool:
        """Whether training keeps only each block's input and computes the rest again in backward."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        # Called "activation" from transformers 5.2x on, the older names warn there.
        kind = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        if wanted:
            getattr(self.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.model, f"{kind}_checkpointing_disable")()

    def compile_blocks(self) -> None:
        """Run compiled blocks."""
        for layer in self.layers:
            layer.compile(dynamic=False)

    def train(self, mode: bool = True) -> Adapter:
        """Training or evaluation mode. Raises Error for training with dropout on."""
        if mode and (names := _dropout(self.model)):
            what = f"trains with dropout ({', '.join(names[:3])}), which no run could repeat"
            raise Error(what, where=self.config.family, fix="set these to 0 in its config")
        super().train(mode)
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        branches: tuple[Tensor, Tensor] | None = None,
        readout: Readout | None = None,
    ) -> Any:
        """Run the network on tokens [B, T] int64; arguments and result are those of `Transformer.forward`.

        documents: [B, T] int64, equal for tokens of the same document, which must lie together; documents do not
        see each other, and positions start anew in each. branches: instead, positions and ends [B, T] int64: a row
        is a tree whose every token is seen by those behind it up to its end. For evaluation.

        Raises:
            Error: tokens that are not [B, T], or a compute_dtype wider than the weights.
        """
        if tokens.ndim != 2:
            raise Error(f"tokens of shape {list(tokens.shape)} are not [batch, time]", where=self.config.family)
        if branches is not None:
            positions, mask = branches[0], self._mask(*branches)
        else:
            positions, mask = count_positions(torch.zeros_like(tokens) if documents is None else documents.long()), None
        return (readout or logits)(self._hidden(tokens, positions, mask), self.head, self.softcap)

    @torch.no_grad()
    def greedy(self, prompts: Tensor, count: int) -> Tensor:
        """The `count` tokens [B, count] int64 that go on prompts [B, T], each the likeliest behind those before it.

        No token ends a text, and none is kept from being taken.

        Raises:
            Error: logits that are no numbers.
        """
        body, written = self.model.base_model, list[Tensor]()
        # The older name of the argument warns from transformers 5.2x on.
        name = "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
        tokens, past = prompts, None
        for _ in range(count):
            with self._arithmetic(tokens.device.type):
                out = body(input_ids=tokens, use_cache=True, return_dict=True, **{name: past})
            past, last = out[name], out.last_hidden_state.to(self.compute_dtype or self.head.dtype)
            greatest, tokens = last_logits(last, self.head, self.softcap).max(-1)
            if not bool(greatest.isfinite().all()):
                fix = "compute in float32 or bfloat16: float16 overflows in some models"
                raise Error("the model's logits are no numbers", where=self.config.family, fix=fix)
            tokens = tokens[:, None]
            written.append(tokens)
        return torch.cat(written, 1)

    def _mask(self, positions: Tensor, ends: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to the scores of a row that is a tree, [B, 1, T, T], for each kind of layer that there is."""
        places = torch.arange(positions.shape[1], device=positions.device)
        seen = (places[:, None] >= places) & (places[:, None] < ends[:, None])
        kinds = {"full_attention": seen}
        if any(self.config.local_layers):
            near = positions[:, :, None] - positions[:, None] < self.config.sliding_window
            kinds = {"sliding_attention": seen & near} | ({} if all(self.config.local_layers) else kinds)
        dtype = self.compute_dtype or self.head.dtype
        lowest = torch.finfo(dtype).min
        masks = {
            kind: torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, lowest)[:, None]
            for kind, sees in kinds.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _hidden(self, tokens: Tensor, positions: Tensor, mask: Any = None) -> Tensor:
        """The last hidden states [B, T, D] in the compute dtype."""
        # Without a mask and a cache, `transformers` finds the packed documents where positions start anew.
        with self._arithmetic(tokens.device.type):
            out = self.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, return_dict=True
            )
        hidden: Tensor = out.last_hidden_state
        return hidden.to(self.compute_dtype or self.head.dtype)

    def _arithmetic(self, device: str) -> Any:
        """A context in which products are taken in the compute dtype."""
        stored = self.head.dtype
        dtype = self.compute_dtype or stored
        if torch.finfo(dtype).bits > torch.finfo(stored).bits:
            what = f"is to compute in {dtype}, but its weights are {stored}"
            raise Error(what.replace("torch.", ""), where=self.config.family, fix="open it with that dtype")
        return torch.autocast(device, dtype, enabled=dtype != stored)

    @torch.no_grad()
    def _check(self, name: str) -> None:
        """Refuse what is not a head over causal hidden states of each document alone, by running it.

        Two documents of the same four tokens; then one token of the first is another. Documents of a length are
        the same computation, so that what is equal is equal up to rounding.
        """
        training = self.training
        self.eval()
        step = max(1, self.config.vocab_size // 7)
        tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]], device=self.head.device) * step
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], device=tokens.device)
        positions = count_positions(documents)
        other = tokens.clone()
        other[0, 1] = 5 * step
        x, y = (self._hidden(t % self.config.vocab_size, positions)[0].float() for t in (tokens, other))
        own = self.model(input_ids=tokens % self.config.vocab_size, position_ids=positions, use_cache=False).logits
        ours = logits(x[None].to(self.head.dtype), self.head, self.softcap)
        self.train(training)
        rounding = torch.finfo(self.head.dtype).eps
        slight, small = max(2 * rounding, 1e-5), max(16 * rounding, 1e-4)
        if _apart(x[:1], y[:1]) > slight:
            raise Error("hidden states depend on tokens that come later", where=name, fix=_FIX)
        if _apart(x[4:], y[4:]) > slight or _apart(x[:4], x[4:]) > small:
            raise Error("hidden states depend on other documents of the same window", where=name, fix=_FIX)
        if _apart(own.float(), ours) > small:
            raise Error("its logits are more than its head times its last hidden states", where=name, fix=_FIX)


_FIX = "take a causal model with attention as Llama, Qwen, Gemma or GPT-2 have it"


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that what was written down compares equal."""
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference as a part of the largest value; infinite for anything that is no number."""
    apart = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return apart if apart == apart else float("inf")


def _expect(model: Any, name: str) -> None:
    """Refuse what can be seen to be no causal model with a plain head."""
    config = getattr(model, "config", None)
    if (
        config is None
        or not hasattr(model, "base_model")
        or not callable(getattr(model, "get_output_embeddings", None))
    ):
        raise Error("is no model of transformers", where=name, fix="give what AutoModelForCausalLM gives")
    head = model.get_output_embeddings()
    if getattr(config, "is_encoder_decoder", False) or head is None or model.base_model is model:
        raise Error("is no causal language model", where=name, fix=_FIX)
    if getattr(head, "bias", None) is not None:
        raise Error("its head has a bias, which the loss has no place for", where=name, fix=_FIX)
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise Error("takes no positions, so that packed documents would run into each other", where=name, fix=_FIX)


def _dropout(model: nn.Module) -> list[str]:
    """Where dropout is on."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found.append(path)
        found += [
            f"{path}.{name}" for name, value in vars(module).items()
            if "drop" in name and isinstance(value, float) and value > 0
        ]  # fmt: skip
    return found
