# SPDX-License-Identifier: Apache-2.0
"""Evaluation: a callable `encode(texts) -> [N, D]` in, named scores out."""

import importlib


try:
    importlib.import_module("evaluate")
    importlib.import_module("scipy")
except ImportError as error:
    raise ImportError(f"hf_distill.evaluation needs {error.name}. Install it with: pip install 'hf_distill[eval]'") from error
