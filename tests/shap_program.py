"""Run by a Python that has SHAP: reads a classifier and rows, writes SHAP's contributions and its mean score."""

import pickle
import sys
from pathlib import Path

import numpy as np
import shap

classifier, rows = pickle.loads(Path(sys.argv[1]).read_bytes())
explainer = shap.TreeExplainer(classifier, feature_perturbation="tree_path_dependent")
found = explainer.shap_values(rows, check_additivity=False)
np.savez(sys.argv[2], contributions=found, mean_score=np.ravel(explainer.expected_value)[0])
