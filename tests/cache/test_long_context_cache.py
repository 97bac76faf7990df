"""The preallocated cache against transformers' dynamic one: the same views, whatever happens between."""

import pytest
import tiny
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_longattn import LongContextCache
from hf_longattn.cache.preallocated import PreallocatedLayer, PreallocatedSlidingLayer

WINDOW = 6


def states(batch, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, count, 4, generator=generator), torch.randn(
        batch, 2, count, 3, generator=generator
    )


def layers(kind):
    if kind == "full":
        return DynamicLayer(), PreallocatedLayer()
    return DynamicSlidingWindowLayer(WINDOW), PreallocatedSlidingLayer(WINDOW)


def check_same(theirs, ours, counts, batch=2):
    for step, count in enumerate(counts):
        assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        for expected, result in zip(
            theirs.update(*states(batch, count, step)), ours.update(*states(batch, count, step)), strict=True
        ):
            assert torch.equal(expected, result)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize(
    "counts", [[1] * 40, [17, 1, 1, 1, 9, 1, 30, 1], [3, 3, 3, 3], [1, 400, 1, 1]], ids=str
)
def test_same_views_as_transformers(kind, counts):
    check_same(*layers(kind), counts)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_step_moves_nothing_while_there_is_room(kind):
    _, ours = layers(kind)
    ours.update(*states(1, 20, 0))
    ours.update(*states(1, 1, 1))
    before = ours._keys.data_ptr()
    for step in range(5):
        ours.update(*states(1, 1, step))
    assert ours._keys.data_ptr() == before


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "crop", "reset"])
def test_changes_as_transformers_makes_them(kind, change):
    theirs, ours = layers(kind)
    for layer in (theirs, ours):
        if change == "crop" and kind == "sliding":
            layer.activate_past_recording()
        layer.update(*states(2, 11, 0))
        if change == "reorder":
            layer.reorder_cache(torch.tensor([1, 1]))
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1]))
        elif change == "crop":
            layer.crop(-3)
    if change == "reset":
        # transformers keeps zeros of the old length; a cache that was reset has seen nothing.
        ours.reset()
        theirs = layers(kind)[0]
    if change == "crop" and kind == "sliding":
        # While it records, transformers' layer shows attention more than the mask covers.
        theirs.record_past = False
    batch = {"repeat": 4, "select": 1}.get(change, 2)
    check_same(theirs, ours, [1, 2, 1], batch)


def test_crop_without_recording_gives_back_a_few_tokens_and_refuses_more():
    ours, straight = PreallocatedSlidingLayer(WINDOW), PreallocatedSlidingLayer(WINDOW)
    keys, values = states(1, 300, 0)
    for part in range(0, 300, 10):
        ours.update(keys[:, :, part : part + 10], values[:, :, part : part + 10])
    ours.crop(-20)
    straight.update(keys[:, :, :280], values[:, :, :280])
    new = states(1, 1, 9)
    for mine, expected in zip(ours.update(*new), straight.update(*new), strict=True):
        assert torch.equal(mine, expected)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        ours.crop(-200)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_save_and_load_continue_where_it_stopped(family, tmp_path):
    model = tiny.build(family, "tree_attention")
    ids = tiny.tokens(1, 30)
    cache = LongContextCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :20], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        expected = model(input_ids=ids[:, 20:], past_key_values=cache).logits
        loaded = LongContextCache.load(tmp_path / "cache.safetensors", model.config, capacity=64)
        assert loaded.get_seq_length() == 20
        result = model(input_ids=ids[:, 20:], past_key_values=loaded).logits
    assert torch.equal(result, expected)


@pytest.fixture
def saved(tmp_path):
    """A model with windows, and the file of a cache that it filled."""
    model, path = tiny.build("gemma2", "tree_attention"), tmp_path / "cache.safetensors"
    cache = LongContextCache(model.config)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 5), past_key_values=cache)
    cache.save(path)
    return model, path


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", None), ("head_dim", 8), ("sliding_window", 9), ("rope_parameters", {"rope_theta": 5e5})],
)
def test_a_cache_of_another_model_is_refused(saved, field, value):
    model, path = saved
    config = tiny.CONFIGS["gemma2" if value else "qwen3"](**{field: value} if value else {})
    with pytest.raises(ValueError, match=field):
        LongContextCache.load(path, config)
    cache = LongContextCache.load(path, model.config)
    with pytest.raises(ValueError, match=field):
        cache.check_model(config)


def test_what_is_no_cache_or_not_all_of_one_is_refused(saved):
    model, path = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    others = {
        "not a saved cache: its format is 'pt'": (tensors, {"format": "pt"}),
        "version 7 of the format, and this library reads versions 1 and 2": (
            tensors,
            {**metadata, "format": "hf_longattn.cache.7"},
        ),
        "does not hold all layers": (
            {name: tensor for name, tensor in tensors.items() if "layers.1." not in name},
            metadata,
        ),
    }
    for words, (held, notes) in others.items():
        save_file(held, path, metadata=notes)
        with pytest.raises(ValueError, match=f"`path`=.*cache.safetensors .*{words}"):
            LongContextCache.load(path, model.config)
    for content in (b"a letter, and not a cache" * 9, path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="`path`=.*not a saved cache, or not all of one"):
            LongContextCache.load(path, model.config)


def test_a_model_in_another_dtype_is_refused_before_a_token_is_added(saved):
    _, path = saved
    model = tiny.build("gemma2", "tree_attention", dtype=torch.bfloat16)
    cache = LongContextCache.load(path, model.config)
    with pytest.raises(ValueError, match="holds keys in torch.float32, got torch.bfloat16"), torch.no_grad():
        model(input_ids=tiny.tokens(1, 5), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_a_fork_has_rows():
    cache = LongContextCache(tiny.CONFIGS["llama"]())
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        cache.fork(0)


def test_forks_are_independent():
    model = tiny.build("llama", "tree_attention")
    ids = tiny.tokens(1, 12)
    cache = LongContextCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        fork = cache.fork(batch_size=3)
        suffixes = tiny.tokens(3, 4, seed=5)
        together = model(input_ids=suffixes, past_key_values=fork).logits
        for row in range(3):
            alone = model(input_ids=torch.cat([ids, suffixes[row : row + 1]], 1)).logits[:, 12:]
            assert tiny.relative_error(together[row : row + 1], alone) <= 2e-5
    assert cache.get_seq_length() == 12


def test_batch_of_another_size_is_refused():
    layer = PreallocatedLayer()
    layer.update(*states(2, 3, 0))
    with pytest.raises(ValueError, match="holds 2 sequences"):
        layer.update(*states(3, 1, 0))


def test_generate_takes_it_as_a_users_cache():
    model, ids = tiny.build("llama", "tree_attention"), tiny.tokens(1, 9)
    expected = model.generate(
        input_ids=ids, do_sample=False, max_new_tokens=6, past_key_values=tf.DynamicCache()
    )
    cache = LongContextCache(model.config)
    assert torch.equal(
        model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, past_key_values=cache), expected
    )


@pytest.mark.parametrize("family", ["qwen2-window", "lightning"])
def test_a_crop_that_one_layer_refuses_changes_none(family):
    model = tiny.build_lightning("hybrid") if family == "lightning" else tiny.build(family, "tree_attention")
    ids, cache, twin = tiny.tokens(1, 120), LongContextCache(model.config), LongContextCache(model.config)
    with torch.no_grad():
        for each in (cache, twin):
            for tokens in ids[:, :118].split([100, 18], 1):
                model(tokens, past_key_values=each)
        for length in (-110, 8):
            with pytest.raises(RuntimeError, match="`crop` would remove 110 tokens"):
                cache.crop(length)
        assert {layer.get_seq_length() for layer in cache.layers} == {118}
        results = [model(ids[:, 118:], past_key_values=each).logits for each in (cache, twin)]
    assert torch.equal(*results)
