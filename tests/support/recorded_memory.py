"""The bytes that a step takes, by the profile of the allocator."""

import torch


def peak(step):
    """The most bytes that are allocated at a time while `step` runs."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = top = 0
    for _, size in changes:
        total += size
        top = max(top, total)
    return top


def bytes_a_token(model):
    """What a token adds to the most that a training step takes at a time."""

    def step(length):
        model.zero_grad(set_to_none=False)
        ids = torch.ones(1, length, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()

    # Gradients are there from then on.
    step(512)
    return (peak(lambda: step(3072)) - peak(lambda: step(2048))) / 1024
