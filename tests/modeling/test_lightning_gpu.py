"""Lightning models on a GPU: kernels inside whole models, every layout of tokens, and captured steps."""

import copy

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.cache import LongContextCache, recurrent, token_rows
from hf_longattn.generation.graph import GraphDecoder
from hf_longattn.modeling.lightning import LightningConfig, LightningForCausalLM

gpu = pytest.mark.gpu
LENGTH = 150
# Where models look the operators up.
OPERATORS = ((token_rows, "lightning_attention"), (recurrent, "lightning_attention_step"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "flag":
        return tiny.build("llama", "lightning_attention")
    config = LightningConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.1, eos_token_id=None, lightning_layers=[0, 2] if kind == "hybrid" else None,
    )  # fmt: skip
    return LightningForCausalLM(config).eval()


def mask_of(layout):
    mask = tiny.padding([LENGTH, 70, 9], LENGTH, "left" if layout == "holes" else layout)
    if layout == "holes":
        mask[0, 20:90], mask[1, -1] = 0, 0
    return mask


def logits(model, ids, mask, cut=None):
    """Logits of all tokens; in pieces of `cut` on a cache where that is given."""
    device, where = model.device, (mask.cumsum(-1) - 1).clamp(min=0).masked_fill(mask == 0, 1)
    ids, mask, where = ids.to(device), mask.to(device), where.to(device)
    cache, parts = None if cut is None else LongContextCache(model.config), []
    for start in range(0, LENGTH, cut or LENGTH):
        part = slice(start, start + (cut or LENGTH))
        keywords = {"position_ids": where[:, part], "past_key_values": cache, "use_cache": cut is not None}
        with torch.no_grad():
            output = model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], **keywords)
        parts.append(output.logits.cpu())
    return torch.cat(parts, 1)


def use_plain_operators(monkeypatch):
    """Replaces the kernels by their plain implementation; returns the names of those that ran."""
    ran = set()

    def plain(name, operator):
        def run(*args, **kwargs):
            ran.add(name)
            return operator(*args, impl="reference", **kwargs)

        return run

    for module, name in OPERATORS:
        monkeypatch.setattr(module, name, plain(name, getattr(module, name)))
    return ran


@pytest.mark.parametrize(("kind", "cut"), [("flag", 64), ("tnl", None), ("hybrid", 1)])
def test_the_plain_implementation_is_what_a_model_can_be_made_to_run(kind, cut, monkeypatch):
    model, ids, mask = model_of(kind), tiny.tokens(3, LENGTH), mask_of("left")
    expected = logits(model, ids, mask, cut)
    ran = use_plain_operators(monkeypatch)
    assert torch.equal(logits(model, ids, mask, cut)[mask.bool()], expected[mask.bool()])
    assert ran == {name for _, name in OPERATORS[: 2 if cut == 1 else 1]}


@gpu
@pytest.mark.parametrize("kind", ["flag", "tnl", "hybrid"])
@pytest.mark.parametrize("layout", ["left", "right", "holes"])
@pytest.mark.parametrize("cut", [None, 1, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_the_plain_implementation(kind, layout, cut, dtype, monkeypatch):
    model, ids, mask = model_of(kind), tiny.tokens(3, LENGTH), mask_of(layout)
    model.to(DTYPES[dtype])
    exact = copy.deepcopy(model).double()
    expected = logits(exact, ids, mask)[mask.bool()]
    model.cuda()
    result = logits(model, ids, mask, cut)[mask.bool()]
    use_plain_operators(monkeypatch)
    standard = logits(model, ids, mask, cut)[mask.bool()]
    bound = 1.5 * (tiny.relative_error(standard, expected) + torch.finfo(DTYPES[dtype]).eps)
    assert tiny.relative_error(result, expected) <= bound


@gpu
@pytest.mark.parametrize("kind", ["flag", "tnl", "hybrid"])
def test_packed_documents_equal_separate_ones(kind):
    model, lengths = model_of(kind).cuda(), [70, 1, 79]
    documents = [tiny.tokens(1, n, seed=n).cuda() for n in lengths]
    where = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    with torch.no_grad():
        expected = torch.cat([model(ids).logits for ids in documents], 1)
        result = model(torch.cat(documents, 1), position_ids=where, use_cache=False).logits
    assert tiny.relative_error(result, expected) <= 1e-5


@gpu
@pytest.mark.parametrize("kind", ["tnl", "hybrid"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_captured_steps_give_the_tokens_of_eager_ones(kind, mode, monkeypatch):
    model, ids, mask = (
        model_of(kind).cuda(),
        tiny.tokens(2, 23).cuda(),
        tiny.padding([23, 9], 23, "left").cuda(),
    )
    keywords = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 60, **mode}
    expected = model.generate(ids, **keywords).tolist()
    captures, real = [], GraphDecoder._capture
    monkeypatch.setattr(GraphDecoder, "_capture", lambda self, *a: (captures.append(1), real(self, *a))[1])
    hf_longattn.prepare_generation(model, prefill_chunk_size=8, cuda_graph=True)
    assert model.generate(ids, **keywords).tolist() == expected
    assert len(captures) == 1 or mode


@gpu
def test_training_gradients_on_a_gpu_equal_those_on_a_cpu():
    ids, gradients = tiny.tokens(2, LENGTH), []
    for device in ("cpu", "cuda"):
        model = model_of("hybrid").to(device).train()
        model(ids.to(device), labels=ids.to(device), use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert tiny.relative_error(gradients[1], gradients[0]) <= 1e-4
