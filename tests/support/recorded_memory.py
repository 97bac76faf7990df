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
