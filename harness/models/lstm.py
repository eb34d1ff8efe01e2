"""A small LSTM language model that `transformers`, PEFT and this harness take like any other.

    e_t = E[x_t]
    i, f, g, o = split(W_ih e_t + b_ih + W_hh h_{t-1} + b_hh, 4)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(c_t)
    logits_t = W_out h_t

One layer, started from h = c = 0: `torch.nn.LSTM` (same gate order, same two biases, same kernel),
with its matrices held by two `nn.Linear`, because PEFT adapts `nn.Linear` and not `nn.LSTM`:

    lstm.input.weight = W_ih (4 h, d)          lstm.recurrent.weight = W_hh (4 h, h)

The recurrent matrix acts inside the fused kernel, once per step, so an adapter cannot add its
output to the layer's; it acts on the weight: the kernel gets W + delta (`effective_weight`).

Legend: B batch, T time, V vocabulary, d embedding size, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

# PEFT's methods whose layer is x -> (W + get_delta_weight) x + b, in training too, with gradients
# through the delta. Others use the name for something else: a rotation of W (OFT, HRA), a factor of
# it (HiRA), a mean of what they sample (PVeRA).
ADDITIVE = {
    *("adalora", "c3a", "delora", "fourierft", "gralora", "loha", "lokr", "lora", "randlora"),
    *("shira", "tinylora", "unilora", "vblora", "vera", "waveft"),
}


class LSTMConfig(PretrainedConfig):
    """Shape of an `LSTMForCausalLM`.

    `n_positions` (also read as `max_position_embeddings`) is the context the model is trained with,
    in tokens: a note for data preparation, not a limit, since an LSTM reads texts of any length.
    None: not stated. `dropout` acts on the embeddings and on the outputs of the LSTM.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), or tied embeddings with d != h.
    """

    model_type = "lstm"
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embeddings": "n_positions"}

    vocab_size: int = 4096
    embedding_size: int = 256
    hidden_size: int = 256
    n_positions: int | None = None
    num_hidden_layers: int = 1  # always: the field is what generic code reads
    dropout: float = 0.0
    initializer_range: float = 0.1  # embedding and head start uniform in plus or minus this
    use_cache: bool = False  # no state is carried between calls
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "embedding_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LSTMConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.num_hidden_layers != 1:
            raise ValueError(
                "LSTMConfig: this model has one layer, got num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LSTMConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                "LSTMConfig: tie_word_embeddings needs embedding_size == hidden_size, got "
                f"{self.embedding_size} and {self.hidden_size}"
            )
        super().__post_init__(**kwargs)


class LSTMLayer(nn.Module):
    """One LSTM layer whose matrices PEFT can adapt: (B, T, d) -> (B, T, h).

    Children: `input` (d -> 4 h) and `recurrent` (h -> 4 h), gates in nn.LSTM's order i, f, g, o.
    Their own forward is never called, so neither are forward hooks on them: inits that observe a
    layer's input (EVA, CorDA) and PEFT's per-sample `adapter_names` do not reach these two.
    """

    def __init__(self, embedding_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(embedding_size, 4 * hidden_size)
        self.recurrent = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, h) of x (B, T, d), from the zero state."""
        w_ih, b_ih = effective_weight(self.input, "lstm.input")
        w_hh, b_hh = effective_weight(self.recurrent, "lstm.recurrent")
        state = x.new_zeros(1, x.shape[0], self.hidden_size)
        with _kernel_that_is_there(x):
            # The call that nn.LSTM.forward makes: (input, (h, c), weights, has_biases, num_layers,
            # dropout, training, bidirectional, batch_first).
            weights = (w_ih, w_hh, b_ih, b_hh)
            output, _, _ = torch.lstm(
                x, (state, state), weights, True, 1, 0.0, self.training, False, True
            )
        return output


@contextmanager
def _kernel_that_is_there(x: torch.Tensor) -> Iterator[None]:
    """Without oneDNN for bf16 on a CPU whose instructions (no AVX-512) it has no bf16 LSTM for.

    torch asks oneDNN all the same, which fails; torch's own kernel takes its place.
    """
    in_bf16 = x.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    older = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    if x.device.type == "cpu" and in_bf16 and older:
        onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = before


def effective_weight(
    layer: nn.Linear | BaseTunerLayer, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias (out) by which `layer`, adapted by PEFT or not, maps x to W x + b.

    A plain layer, or one with merged adapters: its own weight. Disabled adapters: the base weight,
    unmerged first if need be, as PEFT's layers do in their forward. Otherwise W + sum of the active
    adapters' `get_delta_weight`, through which gradients flow to the adapters, rounded to W's dtype
    as merging rounds it.

    Raises:
        ValueError: dropout above 0 in an adapter, which acts on a layer's input and has no meaning
            for a weight; or a bias trained by LoRA (`lora_bias`).
        TypeError: an adapter that is not a sum W + delta (IA3, OFT, DoRA, ...).
    """
    if not isinstance(layer, BaseTunerLayer):
        return layer.weight, layer.bias
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    # One step inwards and not get_base_layer(): with stacked tuners the inner one counts too.
    tuner: Any = layer
    weight, bias = effective_weight(tuner.base_layer, name)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in layer.active_adapters:
        if _holds(layer, adapter):
            _check_additive(layer, adapter, name)
            delta = tuner.get_delta_weight(adapter)
            weight = (weight + delta).to(weight.dtype)
    return weight, bias


def _holds(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether `adapter` is on this layer: an active adapter may have targets elsewhere only."""
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    stores = [getattr(layer, name, ()) for name in names]
    return any(adapter in store for store in stores if hasattr(store, "keys"))


MICA: Any = getattr(variants, "MiCALinearVariant", ())  # none before peft 0.20


def _kept(hidden: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """(B, T, d) at the last `positions` (0: at all), or at those that a tensor names.

    The tensor is of one dimension, or has a row of positions, or a mask, for every sequence: a mask
    leaves (number of positions, d). As transformers' models take it.
    """
    if isinstance(positions, int):
        return hidden[:, -positions:]
    if positions.ndim == 1:
        return hidden[:, positions]
    if positions.dtype == torch.bool:
        return hidden[positions]
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _check_additive(layer: Any, adapter: str, name: str) -> None:
    """Refuse an adapter that adding its delta to the weight would get wrong."""
    # PEFT's own layer, or the one that ours extends.
    modules = [
        cls.__module__ for cls in type(layer).__mro__ if "tuners_utils" not in cls.__module__
    ]
    owner = next((m for m in modules if m.startswith("peft.tuners.")), modules[0])
    package, _, rest = owner.partition(".tuners.")
    method = rest.partition(".")[0] if package == "peft" else type(layer).__name__
    variant = layer.lora_variant.get(adapter) if isinstance(layer, LoraLayer) else None
    if variant is not None and not isinstance(variant, MICA):
        method = type(variant).__name__
    if not hasattr(layer, "get_delta_weight") or (package == "peft" and method not in ADDITIVE):
        raise TypeError(
            f"{name}: {method} cannot adapt an LSTM's matrices, where an adapter must be a matrix "
            f"added to the weight; of PEFT's methods these are: {', '.join(sorted(ADDITIVE))}. "
            f"Or leave {name} out of the targets"
        )
    dropouts = [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]
    for field in ("rank_dropout", "module_dropout"):  # LoHa's and LoKr's, kept as numbers
        dropouts.append(getattr(layer, field, {}).get(adapter, 0.0))
    if max(dropouts) > 0:
        raise ValueError(
            f"{name}: an adapter's dropout acts in its forward, but an LSTM's adapters act on the "
            f"weights: set it to 0 (LoRA: lora_dropout=0), got {max(dropouts)}, or leave {name} "
            "out of the targets"
        )
    if isinstance(layer, LoraLayer) and layer.lora_bias.get(adapter):
        raise ValueError(
            f"{name}: lora_bias=True is not supported on an LSTM's matrices, set it false"
        )


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, one LSTM layer, a linear head without bias: token ids (B, T) -> logits (B, T, V).

    Parameters: V d + 4 h (d + h + 2) + V h (the last term gone when tied), in the modules
    `embedding`, `lstm.input`, `lstm.recurrent` and `head`; each of the four is a target for PEFT.
    Every call starts from the zero state; generation reads its whole text again for each token.
    """

    config_class = LSTMConfig
    config: LSTMConfig
    base_model_prefix = ""
    _input_embed_layer = "embedding"
    # Read only if config.tie_word_embeddings.
    _tied_weights_keys: ClassVar[dict[str, str]] = {  # type: ignore[misc]  # as in every subclass
        "head.weight": "embedding.weight"
    }

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = LSTMLayer(config.embedding_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """`nn.LSTM`'s start for the layer, uniform in plus or minus initializer_range elsewhere."""
        if module is self.lstm.input or module is self.lstm.recurrent:
            bound = 1 / math.sqrt(self.config.hidden_size)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding | nn.Linear):
            bound = self.config.initializer_range
            init.uniform_(module.weight, -bound, bound)

    def get_output_embeddings(self) -> nn.Module:
        """The head, as `transformers` asks for it."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another head in the place of this one, as `transformers` asks for it."""
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, and with `labels` the mean nats of the next tokens, as every causal model here.

        Shapes: input_ids, labels, attention_mask (B, T), labels shifted inside and -100 ignored;
        inputs_embeds (B, T, d) instead of input_ids; logits (B, T, V), or the last `logits_to_keep`
        positions; hidden_states ((B, T, d), (B, T, h)): the layer's input and its output.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; padding on the left, which
                would run through the state; or a cache, which this model has none of.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LSTMForCausalLM: give exactly one of input_ids and inputs_embeds")
        if kwargs.pop("past_key_values", None) is not None:
            raise ValueError("LSTMForCausalLM keeps no cache: past_key_values must be None")
        if attention_mask is not None:
            _check_padding(attention_mask)
        x = self.dropout(self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        hidden = self.dropout(self.lstm(x))
        logits = self.head(_kept(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=(x, hidden) if output_hidden_states else None
        )


def _check_padding(mask: torch.Tensor) -> None:
    """Refuse a mask (B, T) in which a masked token comes before one that counts."""
    if not mask.is_meta and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError(
            "LSTMForCausalLM: attention_mask has padding before a token, which would run through "
            "the state: pad on the right"
        )


def register_lstm() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know model_type "lstm"; harmless if repeated."""
    AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
    AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
