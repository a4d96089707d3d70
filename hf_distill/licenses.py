# SPDX-License-Identifier: Apache-2.0
"""Licences as the Hub names them, and what a teacher's means for its student."""

from collections.abc import Iterable


# Source: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
    lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
    ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
_FREE = (
    "apache-2.0",
    "mit",
    "bsd",
    "isc",
    "zlib",
    "unlicense",
    "cc0-1.0",
    "cc-by-2",
    "cc-by-3",
    "cc-by-4",
    "wtfpl",
    "cdla-perm",
)


def strictest(licenses: Iterable[str | None]) -> str | None:
    """Return the first of several teachers' licences that asks for something; None where one is unknown; else the first."""
    licenses = list(licenses)
    asking = [license for license in licenses if license and caution(license)]
    return asking[0] if asking else None if None in licenses else next(iter(licenses), None)


def require_license(license: str | None) -> None:
    """Raise if the Hub would refuse a licence.

    Raises:
        ValueError: If it is none of those that the Hub knows: the push would fail after the training.
    """
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"card: the licence is {license!r}, expected one of the ids that the Hub knows (apache-2.0, mit, cc-by-4.0, ..., "
            "other; https://huggingface.co/docs/hub/repositories-licenses). The card would be refused when it is pushed."
        )


def caution(license: str | None) -> str | None:
    """Return what a teacher's licence asks of those who distil it, in a sentence; None for one that asks for credit at most."""
    if license is None or license == "unknown":
        return "The teacher's licence is unknown: check it before this model is used or passed on."
    if license.startswith(_FREE) or license in ("ms-pl", "ecl-2.0", "afl-3.0", "bsl-1.0", "ncsa", "postgresql"):
        return None
    if "-nc" in license or "noncommercial" in license or "research" in license:
        return f"The teacher's licence ({license}) forbids commercial use; a model distilled from it may be under the same."
    if "-nd" in license:
        return f"The teacher's licence ({license}) forbids adaptations; whether a student is one has to be cleared."
    return f"The teacher's licence ({license}) has terms of its own on derived models: read them before this one is passed on."
