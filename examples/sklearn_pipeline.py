"""A candidate as a scikit-learn estimator: in a pipeline, under cross-validation, in a grid search."""

from __future__ import annotations

from sklearn.datasets import load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from pomona import PomonaClassifier


def main(epochs: float = 30) -> float:
    """Cross-validate one candidate, then let a grid search choose among three; returns its best score."""
    X, y = load_wine(return_X_y=True)
    network = PomonaClassifier("mlp width=32", epochs=epochs, random_state=0)
    model = make_pipeline(QuantileTransformer(n_quantiles=50), network)
    scores = cross_val_score(model, X, y, cv=3)
    print(f"mlp width=32: accuracy {scores.mean():.3f} over {len(scores)} folds")

    candidates = ["mlp width=32", "mlp width=32 act=gelu norm=layer", "mlp width=32 linear=quadratic act=identity"]
    search = GridSearchCV(model, {"pomonaclassifier__candidate": candidates}, cv=3).fit(X, y)
    for candidate, score in zip(candidates, search.cv_results_["mean_test_score"], strict=True):
        print(f"{score:.3f}  {candidate}")
    print("chosen:", search.best_params_["pomonaclassifier__candidate"])
    return float(search.best_score_)


if __name__ == "__main__":
    main()
