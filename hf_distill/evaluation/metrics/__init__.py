# SPDX-License-Identifier: Apache-2.0
"""The scores as `evaluate.Metric` modules: `evaluate.load("hf_distill/evaluation/metrics/cosine_spearman.py")`."""
