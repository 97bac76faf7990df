"""The Block Transformer against itself: padding, packing, splits of the cache, strategies, loss, saving."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_longattn.modeling.block_transformer import (
    BlockTransformerCache,
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
    register,
)
from hf_longattn.modeling.block_transformer.blocks import block_decoding_loss

register()
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": 60, "eos_token_id": None}
VARIANTS = {
    "prefix": {},
    "L8-P3": {"block_length": 8, "expansion_ratio": 3},
    "L1": {"block_length": 1, "expansion_ratio": 1},
    "L3-odd": {"block_length": 3, "projection_method": "projection_layer", "embedder_hidden_size": 10},
    "projection": {
        "projection_method": "projection_layer",
        "token_hidden_size": 16,
        "token_num_hidden_layers": 1,
    },
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "repeat": {"expansion_method": None},
    "two-vectors": {"n_embedding_tokens": 2, "expansion_ratio": 1},
    "roberta": {
        "embedder_type": "roberta",
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
    },
    "roberta-cls": {
        "embedder_type": "roberta_cls",
        "n_cls_tokens": 3,
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
        "embedder_hidden_size": 16,
    },
    "cross-attention": {
        "decoding_strategy": "cross_attention",
        "expansion_ratio": None,
        "tie_word_embeddings": True,
    },
    "llama-gqa": {"decoder_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"decoder_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"decoder_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2},
}
# fp32 sums in another order: a few units in the last place of logits of size 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant="prefix", seed=0, **fields):
    torch.manual_seed(seed)
    config = BlockTransformerConfig(**(SMALL | VARIANTS[variant] | fields))
    return BlockTransformerForCausalLM(config).eval()


def tokens(batch, length, seed=1):
    return torch.randint(0, 59, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids):
    """Logits of one row without pads from the definition: block by block, token by token, nothing shared."""
    config, base = model.config, model.model
    length, blocks = config.block_length, ids.shape[0] // config.block_length
    logits = torch.zeros(ids.shape[0], config.vocab_size)
    embeds = base.embedder(ids[: blocks * length].view(1, blocks, length), None)
    for row in range(length - 1, ids.shape[0]):
        target, slot = divmod(row + 1, length)
        context = embeds[:, :target].flatten(1, 2)
        each = config.n_embedding_tokens
        mask = torch.zeros(1, 1, target * each, target * each, dtype=torch.bool)
        for query in range(target * each):
            mask[..., query, : (query // each + 1) * each] = True
        base.block_decoder.config._attn_implementation_internal = "sdpa"
        states = base.block_decoder(inputs_embeds=context, attention_mask=mask).last_hidden_state
        prefix = base.token_decoder.expand(states[:, -each:])
        own = ids[target * length : target * length + slot][None]
        if config.decoding_strategy == "prefix":
            inputs = torch.cat([prefix, base.token_decoder.embed_tokens(own)], dim=1)
        else:
            inputs = base.token_decoder.embed_tokens(F.pad(own, (1, 0), value=config.start_token_id))
        if config.decoding_strategy == "summation":
            inputs = inputs + prefix[:, : slot + 1]
        extra = {"encoder_hidden_states": prefix} if config.decoding_strategy == "cross_attention" else {}
        state = base.token_decoder.decoder(inputs_embeds=inputs, **extra).last_hidden_state[0, -1]
        scale = config.token_hidden_size**-0.5 if extra else 1
        logits[row] = model.lm_head(state * scale)
    return logits


@every_variant
@torch.no_grad()
def test_logits_follow_the_definition(variant):
    model, ids = make(variant), tokens(2, 13)
    logits = model(ids).logits
    for row in range(2):
        torch.testing.assert_close(logits[row], by_hand(model, ids[row]), **CLOSE)
    length = model.config.block_length
    assert not logits[:, : length - 1].any() and logits[:, length - 1 :].any(dim=-1).all()


@every_variant
@torch.no_grad()
def test_cached_equals_uncached_at_every_split(variant):
    model, ids = make(variant), tokens(2, 19)
    whole = model(ids, use_cache=False).logits
    for split in range(1, 19):
        cache = BlockTransformerCache(model.config)
        first = model(ids[:, :split], past_key_values=cache).logits
        second = model(ids[:, split:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, msg=f"{split=}", **CLOSE)
        assert cache.get_seq_length() == 19
    cache, rows = BlockTransformerCache(model.config), []
    for column in range(19):
        rows.append(model(ids[:, column : column + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, **CLOSE)


def padded(rows, width, side, pad=60):
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, where], mask[place, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "roberta", "llama-gqa"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(variant, side):
    model = make(variant)
    rows = [tokens(1, length, length)[0] for length in (3, 9, 17, 12)]
    ids, mask = padded(rows, 20, side)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    other = model(torch.where(mask.bool(), ids, 7), attention_mask=mask, use_cache=False).logits
    for place, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[place][mask[place].bool()], alone, **CLOSE)
        torch.testing.assert_close(other[place][mask[place].bool()], alone, **CLOSE)


@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "roberta", "llama-gqa"])
@torch.no_grad()
def test_ragged_rows_in_the_cache(variant):
    """Rows whose blocks fill up at different steps: chunks with pads inside, then single tokens."""
    model, rows = make(variant), [tokens(1, length, length)[0] for length in (5, 22, 13)]
    held = [0, 0, 0]
    cache, seen = BlockTransformerCache(model.config), torch.zeros(3, 0, dtype=torch.long)
    whole = [model(row[None], use_cache=False).logits[0] for row in rows]
    for takes in ((1, 6, 9), (2, 5, 0), (0, 9, 3), (1, 1, 1), (1, 1, 0)):
        chunk = [row[at : at + take] for row, at, take in zip(rows, held, takes, strict=True)]
        ids, mask = padded(chunk, max(takes), "left" if sum(takes) % 2 else "right")
        seen = torch.cat([seen, mask], dim=1)
        logits = model(ids, attention_mask=seen, past_key_values=cache).logits
        for place, (at, take) in enumerate(zip(held, takes, strict=True)):
            torch.testing.assert_close(
                logits[place][mask[place].bool()], whole[place][at : at + take], **CLOSE
            )
        held = [at + take for at, take in zip(held, takes, strict=True)]


@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "llama-gqa"])
@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q", "all-ones-mask"])
@torch.no_grad()
def test_packed_documents_do_not_meet(variant, by):
    model, lengths = make(variant), (9, 1, 14, 4, 6)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    inputs = {"cu_seq_lens_q": ends} if by == "cu_seq_lens_q" else {"position_ids": positions}
    if by == "all-ones-mask":
        inputs["attention_mask"] = torch.ones_like(ids)
    out = model(ids, labels=ids, **inputs)
    scored, total = 0, 0.0
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        alone = model(ids[:, start:end], labels=ids[:, start:end], use_cache=False)
        torch.testing.assert_close(out.logits[:, start:end], alone.logits, **CLOSE)
        count = max(int(end - start) - model.config.block_length, 0)
        scored, total = scored + count, total + alone.loss * count
    torch.testing.assert_close(out.loss, total / scored, **CLOSE)


@torch.no_grad()
def test_cumulative_lengths_count_through_all_rows():
    model, ids = make("llama-gqa"), tokens(2, 14)
    ends = torch.tensor([0, 9, 14, 19, 28])
    logits = model(ids, cu_seq_lens_q=ends).logits
    for row, start, end in ((0, 0, 9), (0, 9, 14), (1, 0, 5), (1, 5, 14)):
        alone = model(ids[row : row + 1, start:end], use_cache=False).logits
        torch.testing.assert_close(logits[row : row + 1, start:end], alone, **CLOSE)


@torch.no_grad()
def test_loss_leaves_out_first_blocks_and_pads():
    model, ids = make(), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    out = model(ids, attention_mask=mask, labels=ids)
    scores = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        2, 13
    )
    wanted = torch.cat([scores[0, 3:], scores[1, 8:]])
    torch.testing.assert_close(out.loss, wanted.mean())
    # Trainer counts all labels of a step, first blocks included: 26 of 39 make two thirds of its loss.
    for count in (39, torch.tensor(39)):
        again = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=count)
        torch.testing.assert_close(again.loss, wanted.mean() * 2 / 3)
    short = model(ids[:, :3], labels=ids[:, :3])
    assert short.loss == 0


@pytest.mark.parametrize("keep", [1, 3, 6, torch.tensor([2, 9, 13])], ids=["1", "3", "6", "indices"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_logits_to_keep(keep, side):
    model = make()
    ids, mask = padded([tokens(1, length, length)[0] for length in (4, 9, 14)], 14, side)
    mask = None if side == "none" else mask
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    whole = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    for use_cache in (False, True):
        kept = model(ids, attention_mask=mask, logits_to_keep=keep, use_cache=use_cache).logits
        torch.testing.assert_close(kept, whole, **CLOSE)


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@pytest.mark.parametrize("variant", ["prefix", "L3-odd", "two-vectors", "roberta"])
@torch.no_grad()
def test_generation_with_cache_equals_without(variant, alignment):
    model = make(variant, block_alignment=alignment)
    ids, mask = padded([tokens(1, length, length)[0] for length in (2, 9, 15)], 15, "left")
    options = {"attention_mask": mask, "max_new_tokens": 11, "do_sample": False, "pad_token_id": 60}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
    assert not torch.equal(beams, cached)


@torch.no_grad()
def test_unequal_prompts_generate_as_alone():
    model = make()
    rows = [tokens(1, length, length)[0] for length in (1, 3, 4, 9, 18)]
    ids, mask = padded(rows, 18, "left")
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 60}
    together = model.generate(ids, attention_mask=mask, **options)[:, 18:]
    for place, row in enumerate(rows):
        alone = model.generate(row[None], **options)[0, len(row) :]
        assert torch.equal(together[place], alone), f"{place=}"


@torch.no_grad()
def test_short_prompt_fills_its_block_with_pads():
    model, ids = make(), tokens(1, 3)
    after = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 3:]
    filled = torch.cat([torch.tensor([[60]]), ids], dim=1)
    assert torch.equal(after, model.generate(filled, max_new_tokens=6, do_sample=False)[:, 4:])


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@torch.no_grad()
def test_generation_goes_on_from_a_cache(alignment):
    model = make(block_alignment=alignment)
    ids, mask = padded([tokens(1, length, length)[0] for length in (12, 9)], 12, "left")
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 60}
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    assert first.past_key_values.get_seq_length() == 18
    longer = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    seen = F.pad(mask, (0, 10), value=1)
    # By column, 22 columns would be filled to 24 anew; the cache was begun with 12, which need no filling.
    wanted = model.generate(longer, attention_mask=seen, block_offset=torch.zeros(2).long(), **options)
    again = model.generate(longer, attention_mask=seen, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, wanted)


@torch.no_grad()
def test_streamed_tokens_are_the_generated_ones():
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    model, streamer, ids = make(), Streamer(), tokens(1, 6)
    out = model.generate(ids, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), None]


@pytest.mark.parametrize("implementation", ["eager", "tree_attention"])
def test_loading_with_an_implementation(implementation, tmp_path):
    import hf_longattn  # noqa: F401  registers the names

    make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    local = "eager" if implementation == "eager" else "sdpa"
    assert model.model.block_decoder.config._attn_implementation == implementation
    assert model.model.token_decoder.decoder.config._attn_implementation == local


@torch.no_grad()
def test_sampling_is_the_same_with_and_without_cache():
    model, ids, drawn = make(), tokens(2, 7), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, do_sample=True, top_k=5, max_new_tokens=12, use_cache=use_cache))
    assert torch.equal(*drawn)


@torch.no_grad()
def test_assisted_decoding_changes_nothing():
    model, small, ids = make(), make(seed=5, num_hidden_layers=1), tokens(1, 10)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=small))
    looked_up = model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)


@pytest.mark.parametrize("alignment", ["tokens", "columns"])
@torch.no_grad()
def test_crop_takes_tokens_back(alignment):
    model = make(block_alignment=alignment)
    ids, mask = padded([tokens(1, length, length)[0] for length in (6, 21)], 21, "left")
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for kept in range(1, 21):
        cache = BlockTransformerCache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(kept - 21)
        assert cache.get_seq_length() == kept
        logits = model(ids[:, kept:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, whole[:, kept:], msg=f"{kept=}", **CLOSE)


@torch.no_grad()
def test_batch_operations_of_the_cache():
    model, ids = make(), tokens(3, 10)
    cache = BlockTransformerCache(model.config)
    model(ids[:, :6], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(torch.arange(3))
    logits = model(ids[order][:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids[order], use_cache=False).logits[:, 6:], **CLOSE)


@torch.no_grad()
def test_cache_holds_one_block_for_every_length_tokens():
    model = make(token_num_hidden_layers=2, num_hidden_layers=2)
    cache = BlockTransformerCache(model.config)
    model(tokens(2, 64), past_key_values=cache)
    held = sum(part.numel() for layer in cache.layers for part in (layer._keys, layer._values))
    layers = model.config.num_hidden_layers + model.config.token_num_hidden_layers
    vanilla = layers * 2 * 2 * 64 * model.config.hidden_size
    assert held == vanilla // 2 // model.config.block_length


IMPLEMENTATIONS = ("eager", "sdpa", "tree_attention", "blockwise_attention")
PAIRS = [(name, variant) for name in IMPLEMENTATIONS for variant in ("prefix", "two-vectors", "llama-gqa")]
PAIRS += [pytest.param("flex_attention", "prefix", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("implementation", "variant"), PAIRS)
@torch.no_grad()
def test_attention_implementations_agree(implementation, variant):
    import hf_longattn  # noqa: F401  registers the names

    model, ids = make(variant), tokens(2, 21)
    wanted = model(ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    assert model.model.block_decoder.config._attn_implementation == implementation
    assert model.model.token_decoder.decoder.config._attn_implementation == (
        "eager" if implementation == "eager" else "sdpa"
    )
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, **CLOSE)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, :9], wanted[:, :9], **CLOSE)
    torch.testing.assert_close(packed[:, 9:], model(ids[:, 9:], use_cache=False).logits, **CLOSE)
    if implementation == "flex_attention":
        return
    rows, mask = padded([tokens(1, length, length)[0] for length in (5, 9, 17)], 17, "left")
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 60}
    generated = model.generate(rows, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(rows, **options))


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = make().train(), tokens(2, 18)
    model(ids, labels=ids).loss.backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(grad.any() for grad in wanted.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], msg=name)


@every_variant
@torch.no_grad()
def test_save_and_load(variant, tmp_path):
    model, ids = make(variant), tokens(1, 11)
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is BlockTransformerForCausalLM
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_training_step_compiles_without_breaks(masked):
    model, ids = make(), tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def loss_of(ids):
        return model(ids, attention_mask=mask if masked else None, labels=ids, use_cache=False).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), loss_of(ids))


def train_in_a_process(rank, port, path):
    import os

    from accelerate import Accelerator

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make().train())
    own = tokens(4, 18)[2 * rank : 2 * rank + 2]
    accelerator.backward(model(own, labels=own).loss)
    if rank == 0:
        torch.save({name: weight.grad for name, weight in model.module.named_parameters()}, path)
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(train_in_a_process, (port, path), nprocs=2)
    model, ids = make().train(), tokens(4, 18)
    model(ids, labels=ids).loss.backward()
    for name, gradient in torch.load(path).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name, **CLOSE)


def test_shifted_labels_replace_labels():
    model, ids = make(), tokens(2, 18)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
        torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, wanted)
        assert model(ids, labels=ids, shift_labels=shifted.roll(1, 0)).loss != wanted


def test_auxiliary_losses():
    contexts, embeds = (
        torch.randn(2, 5, 1, 8, requires_grad=True),
        torch.randn(2, 5, 1, 8, requires_grad=True),
    )
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False
    pairs = [(contexts[b, i, 0], embeds[b, i + 1, 0]) for b, i in mask.nonzero().tolist()]
    mse = torch.stack([(h - e).square().mean() for h, e in pairs]).mean()
    torch.testing.assert_close(block_decoding_loss(contexts, embeds, mask, "mse"), mse)
    table = (
        torch.stack([torch.stack([F.cosine_similarity(h, e, dim=0) for _, e in pairs]) for h, _ in pairs])
        / 0.07
    )
    wanted = -table.log_softmax(dim=-1).diagonal().mean()
    loss = block_decoding_loss(contexts, embeds, mask, "contrastive")
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert contexts.grad.any() and embeds.grad is None


@torch.no_grad()
def test_auxiliary_loss_counts_complete_neighbours_only():
    model, ids = make(block_decoding_loss="mse", block_decoding_loss_weight=0.5), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    out = model.model(ids, attention_mask=mask)
    assert out.block_pair_mask.tolist() == [[1, 1], [1, 0]]
    difference = (out.context_embeds[:, :-1] - out.block_embeds[:, 1:]).square()
    plain = make()(ids, attention_mask=mask, labels=ids).loss
    total = model(ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(total, plain + 0.5 * difference[out.block_pair_mask.bool()].mean())


@torch.no_grad()
def test_the_batches_of_a_step_add_up_to_its_loss():
    model, ids = make(block_decoding_loss="mse"), tokens(4, 18)
    whole = model(ids, labels=ids).loss
    count = torch.tensor(ids[:, 1:].numel())
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=count).loss, whole)
    parts = [model(part, labels=part, num_items_in_batch=count).loss for part in ids.split(1)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize("loss", ["chunked", "model", None])
def test_unequal_documents_add_up_where_first_blocks_have_no_labels(loss):
    import hf_longattn

    model, ids, lengths = make().train(), tokens(3, 24), torch.tensor([24, 10, 3])
    if loss is not None:
        hf_longattn.prepare_training(model, loss=loss, loss_chunk_size=5)
    mask = (torch.arange(24) < lengths[:, None]).long()
    # The first block of 4; the third row has no label at all.
    labels = ids.masked_fill(mask == 0, 60).index_fill(1, torch.arange(4), 60)
    count, parameters = (labels[:, 1:] != 60).sum(), list(model.parameters())

    def gradient(*rows):
        batches = ((part[row] for part in (ids, mask, labels)) for row in rows)
        losses = [
            model(part, attention_mask=own, labels=wanted, ignore_index=60, num_items_in_batch=count).loss
            for part, own, wanted in batches
        ]
        total = torch.stack(losses).sum()
        return torch.cat([total[None], *(part.flatten() for part in torch.autograd.grad(total, parameters))])

    whole, parts = gradient(slice(3)), gradient(*(slice(row, row + 1) for row in range(3)))
    assert (parts - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("variant", ["prefix", "llama-gqa", "roberta"])
@pytest.mark.parametrize("loss", ["chunked", "model"])
def test_prepared_layers_train_as_they_are(loss, variant):
    import hf_longattn

    model, ids = make(variant, block_decoding_loss="mse").train(), tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    inputs = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "num_items_in_batch": 51}

    def trained():
        model.zero_grad()
        loss = model(input_ids=ids, **inputs).loss
        loss.backward()
        return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])

    plain = trained()
    hf_longattn.prepare_training(model, block_size=3, loss=loss, loss_chunk_size=8)
    for ours, theirs in zip(trained(), plain, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    hf_longattn.restore(model)


def test_learns_a_repeating_text():
    model = make(initializer_range=0.05).train()
    ids = tokens(1, 6).repeat(4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.2


def test_resizing_reaches_both_tables():
    model = make()
    model.resize_token_embeddings(70)
    assert model.model.embedder.embeddings.weight.shape[0] == model.lm_head.weight.shape[0] == 70
    model(torch.full((1, 9), 69), labels=torch.full((1, 9), 69)).loss.backward()


def test_hidden_states_and_attentions():
    model, ids = make(), tokens(1, 12)
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(1, 12, 32)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, 2, 3, 3)] * 2


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"block_length": 0}, "block_length"),
        ({"n_embedding_tokens": 3}, "n_embedding_tokens"),
        ({"embedder_hidden_size": 5}, "embedder_hidden_size"),
        ({"decoding_strategy": "summation"}, "expansion_ratio"),
        ({"expansion_method": None, "token_hidden_size": 16}, "token_hidden_size"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"block_alignment": "rows"}, "block_alignment"),
    ],
)
def test_configuration_refuses(fields, name):
    with pytest.raises(Exception, match=f"{name}"):
        BlockTransformerConfig(**(SMALL | fields))


def test_forward_refuses():
    model, ids = make(), tokens(1, 8)
    with pytest.raises(ValueError, match="`input_ids`"):
        model(None)
    with pytest.raises(ValueError, match="`input_ids`"):
        model(ids[0])
    for shape in ((1, 1, 8, 8), (1, 7), (2, 8)):
        with pytest.raises(ValueError, match="`attention_mask`"):
            model(ids, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="`past_key_values`"):
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        model(ids, position_ids=packed, past_key_values=BlockTransformerCache(model.config))
    with pytest.raises(ValueError, match="`block_alignment='tokens'`"):
        make(block_alignment="columns")(ids, position_ids=packed)
    with pytest.raises(ValueError, match="`cache_implementation`"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="`assistant_early_exit`"):
        model.generate(ids, assistant_early_exit=1, max_new_tokens=2)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 21), min_size=1, max_size=3),
    st.integers(0, 5),
    st.booleans(),
    st.data(),
)
@torch.no_grad()
def test_any_lengths(block_length, lengths, extra, left, data):
    model = make(block_length=block_length, projection_method="projection_layer", num_hidden_layers=1)
    rows = [tokens(1, length, length)[0] for length in lengths]
    ids, mask = padded(rows, max(lengths) + extra, "left" if left else "right")
    split = data.draw(st.integers(1, ids.shape[1]))
    cache = BlockTransformerCache(model.config)
    logits = model(ids[:, :split], attention_mask=mask[:, :split], past_key_values=cache).logits
    if split < ids.shape[1]:
        rest = model(ids[:, split:], attention_mask=mask, past_key_values=cache).logits
        logits = torch.cat([logits, rest], dim=1)
    for place, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[place][mask[place].bool()], alone, **CLOSE)


def test_every_field_is_listed():
    """A new field needs a reason: the list makes adding one show."""
    import dataclasses

    from transformers import PreTrainedConfig

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(BlockTransformerConfig)} - inherited
    assert len(own) == 52, sorted(own)


@torch.no_grad()
def test_a_forward_that_is_asked_for_no_row_fills_the_cache_alone():
    model, ids = make(), tokens(2, 11)
    cache = BlockTransformerCache(model.config)
    outputs = model(ids, past_key_values=cache, logits_to_keep=ids.new_empty(0))
    assert outputs.logits.shape[:2] == (2, 0)
    whole = model(torch.cat([ids, ids], dim=1)).logits[:, 11:]
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, **CLOSE)
