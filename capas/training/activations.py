"""Estimate the memory that a training step or an evaluation takes beside weights and optimizer states.

The model of config.json is built without weights. A forward and a backward pass run through it on fake
tensors (`torch._subclasses.FakeTensorMode`), which have a shape and a dtype but no content. All tensors that
are created are counted, and the result is the most bytes alive at once. The estimate therefore holds for any
architecture and for what transformers and PEFT really do: tensors saved by autograd, casts to float32, copies
of keys and values, the logits and their float32 copies for the cross entropy. For a dense layer the result
equals the formulas of the field (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models"), less what frozen weights need not save; test_memory.py has the sum by hand.

Tracing the first layers is enough: each further layer adds the same amount.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capas.core.params import Params
from capas.models.coverage import quantizable, unwrapped
from capas.training import malloc_heap

_FEW, _MORE = 2, 6  # numbers of layers to trace; a model with more layers is extrapolated from both


@dataclass(frozen=True)
class Batch:
    """The size of a batch: its records, and the tokens of the longest one, to which all are padded."""

    num_records: int
    num_tokens: int


class Phase(NamedTuple):
    """A part of the stage whose memory is measured.

    Before the Trainer exists there is neither gradient checkpointing nor mixed precision. The fused loss is
    Liger's, which handles a few tokens at a time and never holds the logits of all of them.
    """

    name: str
    batch: Batch
    backward: bool
    checkpointing: bool
    mixed_precision: bool
    fused_loss: bool = False


def measure(
    model: nn.Module, phases: list[Phase], of_heap: bool
) -> tuple[dict[str, int], int | None]:
    """Return the most bytes alive at once in each phase, without weights, adapter, gradients and optimizer.

    Args:
        model: the model as it is trained, on the meta device (`build`).
        phases: the phases in the order in which they run.
        of_heap: True if tensors come from malloc, as on a CPU.

    Returns:
        {name of the phase: bytes}, and the most bytes that malloc holds in all phases; None without
        `of_heap`, or if malloc does not report it.
    """
    with_heap = of_heap and malloc_heap.is_known()

    def work() -> list[int]:
        malloc = malloc_heap.Heap() if with_heap else None
        alive = [_step(model, phase, malloc) for phase in phases]
        return [*alive, malloc.most] if malloc else alive

    found = _extrapolated(model, lambda: malloc_heap.in_child(work) if with_heap else work())
    names = [phase.name for phase in phases]
    return dict(zip(names, found, strict=False)), found[-1] if with_heap else None


def _step(model: Any, phase: Phase, malloc: malloc_heap.Heap | None) -> int:
    model.train(phase.backward)
    if phase.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    number, length = phase.batch.num_records, phase.batch.num_tokens
    with FakeTensorMode(), _Faked(model), torch.set_grad_enabled(phase.backward):
        for parameter in model.parameters():
            if parameter.requires_grad:  # the micro-batch before has left gradients
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(number, length, dtype=torch.long)
        with Alive(malloc) as alive:
            # A batch of one record has no padding, so transformers needs no mask.
            mask = {"attention_mask": torch.ones_like(ids)} if number > 1 else {}
            if phase.fused_loss:
                _fused_loss(model, phase, ids, mask)
            else:
                output = _forward(model, phase)(input_ids=ids, labels=ids.clone(), **mask)
                loss = output["loss"]
                if phase.backward:
                    del output
                    loss.backward()
        return alive.most


def _forward(model: Any, phase: Phase) -> Any:
    """Return the model's forward; for mixed precision as accelerate wraps it, with outputs in float32."""
    if not phase.mixed_precision:
        return model
    from accelerate.utils.operations import convert_outputs_to_fp32

    return convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))


def _fused_loss(model: Any, phase: Phase, ids: torch.Tensor, mask: dict[str, Any]) -> None:
    """Run a backward pass with the tensors that Liger's loss keeps (Hsu et al. 2024, section 3.2).

    They are the gradient of the hidden states, and the logits of one chunk of tokens.
    """
    base = unwrapped(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=phase.mixed_precision):
        hidden = base.get_decoder()(input_ids=ids, **mask, use_cache=False).last_hidden_state
    vocabulary, size = base.get_output_embeddings().weight.shape
    gradient = torch.empty_like(hidden)
    chunk = -(-ids.numel() // -(-vocabulary // size))
    logits = hidden.new_empty(2 ** (chunk - 1).bit_length(), vocabulary)
    kept = (logits, logits.float())
    del logits, kept
    hidden.backward(gradient)


def _extrapolated(model: nn.Module, measured: Callable[[], list[int]]) -> list[int]:
    """Return the bytes of the whole model, extrapolated from its first layers if it has many."""
    owner, name, layers = _decoder(model)
    if owner is None or len(layers) <= _MORE:
        return measured()
    found = []
    try:
        for number in (_FEW, _MORE):
            setattr(owner, name, layers[:number])
            found.append(measured())
    finally:
        setattr(owner, name, layers)
    rest = len(layers) - _MORE
    return [more + (more - few) * rest // (_MORE - _FEW) for few, more in zip(*found, strict=True)]


def _decoder(model: nn.Module) -> tuple[nn.Module | None, str, Any]:
    """Return the decoder's list of layers, after the module that owns it and its name in that module."""
    number = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == number:
                return owner, name, child
    return None, "", []


class Alive(TorchDispatchMode):
    """A mode that counts the bytes of tensors created in its block that are still alive, now and at most.

    Args:
        malloc: a heap that allocates a block for each tensor, and frees it with the tensor.
    """

    def __init__(self, malloc: malloc_heap.Heap | None = None) -> None:
        super().__init__()
        self.now = self.most = 0
        self._malloc = malloc
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in tree_leaves(made):
            if _is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        give_back = self._malloc.take(num_bytes) if self._malloc else None

        def forget(_: Any) -> None:
            self._storages.pop(key, None)
            self.now -= num_bytes
            if give_back:
                give_back()

        self._storages[key] = ref(storage, forget)
        self.now += num_bytes
        self.most = max(self.most, self.now)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class _Faked:
    """A context manager that replaces the tensors of a meta model by fake tensors in its block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        made: dict[int, torch.Tensor] = {}
        for module in self._model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        self._kept.append((tensors, name, tensor))
                        if id(tensor) not in made:
                            made[id(tensor)] = _fake(tensor)
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for tensors, name, tensor in self._kept:
            tensors[name] = tensor


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return fake
    return nn.Parameter(fake, requires_grad=tensor.requires_grad)


def unquantized_config(folder: Path, trust_remote_code: bool) -> Any:
    """Return the configuration of the model in `folder` without its quantization, for `from_config`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def build(
    config: Any, model: Params, lora: Params, quantization: dict[str, Any] | None
) -> nn.Module:
    """Build the model as it is trained, on the meta device, with linear layers like those of bitsandbytes.

    Args:
        config: a `transformers.PretrainedConfig`.
        model: the params group; dtype, attn_implementation and trust_remote_code matter.
        lora: the params group.
        quantization: keys of the quantization group, such as load_in_4bit; None for full precision.

    Raises:
        CapasError: see `lora.check_target_modules`.
        ValueError: transformers or PEFT rejects the configuration.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from capas.training.lora import check_target_modules, make_config, trains_all

    dtype = getattr(torch, model.dtype)
    flash = model.attn_implementation == "flash_attention_2"  # keeps the same tensors as sdpa
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="sdpa" if flash else model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
        if quantization:
            _quantize(base, quantization)
        if trains_all(lora):
            return base
        check_target_modules(base, lora.target_modules)
        return get_peft_model(base, make_config(lora))


def _quantize(base: Any, quantization: dict[str, Any]) -> None:
    """Mark linear layers as quantized; make other float16 weights float32, as `lora.add_with_peft` does."""
    four = bool(quantization["load_in_4bit"])
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = four, not four
    for layer in quantizable(base):
        _disguise(layer, quantization if four else None)
    for parameter in base.parameters():
        if parameter.dtype == torch.float16 and not getattr(parameter, "of_bitsandbytes", False):
            parameter.data = parameter.data.to(torch.float32)


def _disguise(layer: Any, four: dict[str, Any] | None) -> None:
    """Make PEFT treat the layer as one of bitsandbytes, and let it allocate what such a layer allocates."""
    weight = layer.weight
    weight.requires_grad = False
    weight.of_bitsandbytes = True
    if four:
        layer.compute_dtype = getattr(torch, four["bnb_4bit_compute_dtype"])
        weight.compress_statistics = four["bnb_4bit_use_double_quant"]
        weight.quant_type = four["bnb_4bit_quant_type"]
        layer.__class__ = _four_bit()
    else:
        layer.state = _State()
        layer.index = None
        layer.__class__ = _eight_bit()


@dataclass
class _State:
    """The fields of a Linear8bitLt's state that PEFT copies."""

    has_fp16_weights: bool = False
    threshold: float = 6.0


def _four_bit() -> type:
    import bitsandbytes as bnb

    class Linear4bit(bnb.nn.Linear4bit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = _Dequantized.apply(x.to(self.compute_dtype), self.weight, False)
            return made.to(x.dtype)

    return Linear4bit


def _eight_bit() -> type:
    import bitsandbytes as bnb

    class Linear8bitLt(bnb.nn.Linear8bitLt):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Dequantized.apply(x, self.weight, True)

    return Linear8bitLt


class _Dequantized(torch.autograd.Function):
    """A product like bitsandbytes' MatMul4Bit and MatMul8bitFp.

    Forward and backward each hold the whole weight in the input's dtype for a moment.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, keeps_input: bool) -> torch.Tensor:
        ctx.weight, ctx.x = weight, x if keeps_input else None
        whole = torch.empty_like(weight, dtype=x.dtype)
        return x.new_empty(*x.shape[:-1], whole.numel() // x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        whole = torch.empty_like(ctx.weight, dtype=gradient.dtype)
        num_inputs = whole.numel() // gradient.shape[-1]
        return gradient.new_empty(*gradient.shape[:-1], num_inputs), None, None
