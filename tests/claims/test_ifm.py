from pomona.claims.ifm import _random_groups, ifm


def test_smoke_run_gives_accuracies():
    import torch

    evidence = ifm("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert set(evidence.details) == {"width 8", "width 16", "vgg"}
    row = evidence.details["width 16"]
    assert {"whole", "merge 0.5", "remove 0.5", "random merge 0.5", "complexity"} <= set(row)
    groups = _random_groups(3, 8, torch.Generator().manual_seed(0))
    assert len(groups) == 3 and sorted(u for g in groups for u in g) == list(range(8))
