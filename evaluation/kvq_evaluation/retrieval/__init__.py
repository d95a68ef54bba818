"""Retrieval from long contexts, on texts that are made and not downloaded."""

from kvq_evaluation.retrieval.documents import RETRIEVAL_TASKS
from kvq_evaluation.retrieval.evaluate import (
    evaluate_retrieval,
    retrieval_examples,
    retrieval_of_caches,
)
from kvq_evaluation.retrieval.examples import RetrievalExample, make_examples
from kvq_evaluation.retrieval.rows import RetrievalRow

__all__ = [
    "RETRIEVAL_TASKS",
    "RetrievalExample",
    "RetrievalRow",
    "evaluate_retrieval",
    "make_examples",
    "retrieval_examples",
    "retrieval_of_caches",
]
