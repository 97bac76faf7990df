"""Training of Block Transformers: compiled, on two processes, by each loss."""

import pytest
import torch
from block_variants import CLOSE, make, tokens
from torch.nn import functional as F

from hf_longattn.modeling.block_transformer.blocks import block_decoding_loss


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


@pytest.mark.parametrize("variant", ["prefix", "projection", "roberta"])
def test_reentrant_checkpoints_reach_adapters_of_both_decoders(variant):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    model, ids = get_peft_model(make(variant), lora).train(), tokens(2, 14)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    wanted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, wanted[name], msg=name, **CLOSE)


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
