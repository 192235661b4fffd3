from pomona.claims.spectrum_prune import spectrum_prune


def test_networks_schemes_and_densities_are_all_measured():
    evidence = spectrum_prune("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    points = evidence.details["points"]
    assert len(points) == 2 * 3
    assert all(0 <= p["overlap"] <= 1 and p["error"] > 0 for p in points.values())
    assert -1 <= evidence.details["spearman of accuracy and spectral error"]["all"] <= 1
