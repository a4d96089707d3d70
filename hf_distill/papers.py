# SPDX-License-Identifier: Apache-2.0
"""The papers, as cards name and cite them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper by its arXiv id."""

    arxiv: str
    key: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int

    @property
    def link(self) -> str:
        """Its title, linked, with authors and venue, in Markdown."""
        surnames = [author.rpartition(" ")[2] for author in self.authors]
        named = " and ".join(surnames) if len(surnames) < 3 else f"{surnames[0]} et al."
        return f"[{self.title}](https://huggingface.co/papers/{self.arxiv}) ({named}, {self.venue})"

    @property
    def bibtex(self) -> str:
        """Its BibTeX entry."""
        return entry(
            self.key,
            title=self.title,
            author=" and ".join(self.authors),
            journal=self.venue,
            year=str(self.year),
            eprint=self.arxiv,
            archivePrefix="arXiv",
        )


def entry(key: str, kind: str = "article", **fields: str) -> str:
    """Return a BibTeX entry."""
    return "\n".join([f"@{kind}{{{key},", *(f"  {name} = {{{value}}}," for name, value in fields.items()), "}"])


PAPERS = {
    paper.arxiv: paper
    for paper in (
        Paper(
            "2203.07687",
            "zhao2022hpd",
            "Compressing Sentence Representation for Semantic Retrieval via Homomorphic Projective Distillation",
            ("Xuandong Zhao", "Zhiguo Yu", "Ming Wu", "Lei Li"),
            "Findings of ACL 2022",
            2022,
        ),
        Paper(
            "2301.12005",
            "kim2023embeddistill",
            "EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval",
            (
                "Seungyeon Kim",
                "Ankit Singh Rawat",
                "Manzil Zaheer",
                "Sadeep Jayasumana",
                "Veeranjaneyulu Sadhanala",
                "Wittawat Jitkrittum",
                "Aditya Krishna Menon",
                "Rob Fergus",
                "Sanjiv Kumar",
            ),
            "arXiv 2301.12005",
            2023,
        ),
        Paper(
            "2302.08387",
            "mao2023lealla",
            "LEALLA: Learning Lightweight Language-agnostic Sentence Embeddings with Knowledge Distillation",
            ("Zhuoyuan Mao", "Tetsuji Nakagawa"),
            "EACL 2023",
            2023,
        ),
        Paper(
            "2504.06036",
            "wang2025multisense",
            "Multi-Sense Embeddings for Language Models and Knowledge Distillation",
            ("Qitong Wang", "Mohammed J. Zaki", "Georgios Kollias", "Vasileios Kalantzis"),
            "Findings of ACL 2025",
            2025,
        ),
    )
}


def citations(paper: Paper | None, teacher: str | None) -> str:
    """Return BibTeX of a paper, and of a teacher by the page it has on the Hub; either may be None."""
    found = [paper.bibtex] if paper else []
    if teacher:
        named = "".join(letter for letter in teacher if letter.isalnum())
        found.append(entry(named, "misc", title=teacher, note="teacher", url=f"https://huggingface.co/{teacher}"))
    return "\n\n".join(found)
